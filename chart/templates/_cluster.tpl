{{/* What the cluster must have, asked where there is one: a real API server serves apiregistration.k8s.io, the set that
`helm template` and `helm lint` assume does not have it. */}}
{{- define "tuning.cluster.validate" -}}
{{- if .Capabilities.APIVersions.Has "apiregistration.k8s.io/v1" -}}
{{- include "tuning.cluster.kinds" . -}}
{{- include "tuning.cluster.subnet" . -}}
{{- if .Values.clusterChecks.enabled -}}
{{- if .Values.gang.slotLabel -}}
{{- include "tuning.cluster.scheduler" . -}}
{{- end -}}
{{- if .Values.nodePool.create -}}
{{- include "tuning.cluster.efa" . -}}
{{- else -}}
{{- include "tuning.cluster.slots" . -}}
{{- end -}}
{{- include "tuning.cluster.storage" . -}}
{{- include "tuning.cluster.account" . -}}
{{- end -}}
{{- if .Release.IsUpgrade -}}
{{- include "tuning.cluster.unchanged" . -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "tuning.cluster.kinds" -}}
{{- $kinds := dict "batch.volcano.sh/v1alpha1/Job" "install Volcano 1.12 or later" "scheduling.volcano.sh/v1beta1/Queue" "install Volcano 1.12 or later" -}}
{{- if .Values.nodePool.create -}}
{{- $_ := set $kinds "karpenter.sh/v1/NodePool" "install Karpenter 1.5 or later, or write nodePool.create: false" -}}
{{- if .Values.nodeClass.create -}}
{{- $_ := set $kinds "karpenter.k8s.aws/v1/EC2NodeClass" "install Karpenter 1.5 or later for AWS, or write nodeClass.create: false" -}}
{{- end -}}
{{- end -}}
{{- if .Values.podMonitor.enabled -}}
{{- $_ := set $kinds "monitoring.coreos.com/v1/PodMonitor" "install the Prometheus operator, or write podMonitor.enabled: false" -}}
{{- end -}}
{{- range $kind, $remedy := $kinds -}}
{{- if not ($.Capabilities.APIVersions.Has $kind) -}}
{{- fail (printf "cluster: got no %s, expected its definition to be installed; %s" $kind $remedy) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "tuning.cluster.subnet" -}}
{{- if and (eq (include "tuning.storage.mode" .) "dynamic") (not (and .Values.storage.fsx.subnetId .Values.storage.fsx.securityGroupIds)) -}}
{{- fail "storage.fsx: got no subnetId or no securityGroupIds, expected both to make a file system; give them, or storage.existingClaim" -}}
{{- end -}}
{{- end }}

{{/* The action enqueue lets no pod be made before the cluster could hold the gang; with no pod no node is bought. */}}
{{- define "tuning.cluster.scheduler" -}}
{{- $found := lookup "v1" "ConfigMap" $.Values.clusterChecks.volcanoNamespace $.Values.clusterChecks.volcanoConfigMap -}}
{{- $config := dig "data" "volcano-scheduler.conf" "" $found | fromYaml -}}
{{- $votes := list -}}
{{- $waits := false -}}
{{- range $tier := get $config "tiers" | default list -}}
{{- range $plugin := get $tier "plugins" | default list -}}
{{- if ne (toString (get $plugin "enableJobEnqueued")) "false" -}}
{{- if has $plugin.name (list "overcommit" "proportion" "capacity") -}}
{{- $votes = append $votes $plugin.name -}}
{{- else if and (eq $plugin.name "sla") (not $votes) -}}
{{- $waits = true -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (contains "enqueue" (get $config "actions" | toString)) $votes (not $waits) -}}
{{- fail (printf "ConfigMap %s/%s: got actions %q with %s, which never let a gang start from zero nodes; write actions: \"allocate, backfill\", or enableJobEnqueued: false beside %s" $.Values.clusterChecks.volcanoNamespace $.Values.clusterChecks.volcanoConfigMap $config.actions (join ", " $votes) (join " and " $votes)) -}}
{{- end -}}
{{- end }}

{{/* EFA's plugin tolerates no taint by itself; a node that never reports its devices is paid for and never used. */}}
{{- define "tuning.cluster.efa" -}}
{{- if ne (include "tuning.pod.efa" .) "0" -}}
{{- range $set := (lookup "apps/v1" "DaemonSet" "" "").items -}}
{{- range $taint := contains "efa-k8s-device-plugin" $set.metadata.name | ternary $.Values.nodePool.taints list -}}
{{- $tolerated := eq $taint.effect "PreferNoSchedule" -}}
{{- range dig "spec" "template" "spec" "tolerations" list $set -}}
{{- $same := or (eq (get . "operator") "Exists") (eq (get . "value") (get $taint "value")) -}}
{{- if and $same (has (get . "key") (list "" $taint.key)) (has (get . "effect") (list "" $taint.effect)) -}}
{{- $tolerated = true -}}
{{- end -}}
{{- end -}}
{{- if not $tolerated -}}
{{- fail (printf "DaemonSet %s/%s: got no toleration of %s:%s (nodePool.taints), expected one: nodes would be bought and never report their EFA devices; give tolerations in the values of its chart" $set.metadata.namespace $set.metadata.name $taint.key $taint.effect) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* A pool that is there gives nodes to slots only if it names their label. */}}
{{- define "tuning.cluster.slots" -}}
{{- $label := .Values.gang.slotLabel -}}
{{- if and $label (.Capabilities.APIVersions.Has "karpenter.sh/v1/NodePool") -}}
{{- $keys := list -}}
{{- range (lookup "karpenter.sh/v1" "NodePool" "" "").items -}}
{{- range .spec.template.spec.requirements -}}{{- $keys = append $keys .key -}}{{- end -}}
{{- end -}}
{{- if not (has $label $keys) -}}
{{- fail (printf "gang.slotLabel: got %s, which no NodePool requires: the pods would wait for ever; add {key: %s, operator: Exists} to its requirements, or write slotLabel: \"\"" $label $label) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "tuning.cluster.storage" -}}
{{- $mode := include "tuning.storage.mode" . -}}
{{- $claim := .Values.storage.existingClaim -}}
{{- if $claim -}}
{{- $found := lookup "v1" "PersistentVolumeClaim" .Release.Namespace $claim -}}
{{- if not $found -}}
{{- fail (printf "storage.existingClaim: got %s, expected a claim of namespace %s; create it, or name another" $claim .Release.Namespace) -}}
{{- end -}}
{{- if and (gt (int .Values.nodes) 1) (not (has "ReadWriteMany" $found.spec.accessModes)) -}}
{{- fail (printf "storage.existingClaim: got %s with %s, expected ReadWriteMany for %d nodes; use another claim" $claim (join ", " $found.spec.accessModes) (int .Values.nodes)) -}}
{{- end -}}
{{- end -}}
{{- if has $mode (list "static" "dynamic") -}}
{{- $driver := lookup "storage.k8s.io/v1" "CSIDriver" "" "fsx.csi.aws.com" -}}
{{- if not $driver -}}
{{- fail "cluster: got no CSIDriver fsx.csi.aws.com, expected the FSx CSI driver; install aws-fsx-csi-driver 1.9 or later, or give storage.existingClaim" -}}
{{- end -}}
{{- if and (eq $mode "dynamic") (ne (dig "spec" "fsGroupPolicy" "" $driver) "File") -}}
{{- fail (printf "CSIDriver fsx.csi.aws.com: got fsGroupPolicy %q, expected File: a new file system is root's, and the pods run as user %d; set csidriver.fsGroupPolicy: File in the driver's chart" (dig "spec" "fsGroupPolicy" "" $driver) (int .Values.security.runAsUser)) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "tuning.cluster.account" -}}
{{- if and (not .Values.serviceAccount.create) (not (lookup "v1" "ServiceAccount" .Release.Namespace .Values.serviceAccount.name)) -}}
{{- fail (printf "serviceAccount.name: got %s, expected an account of namespace %s; create it, or write serviceAccount.create: true" .Values.serviceAccount.name .Release.Namespace) -}}
{{- end -}}
{{- end }}

{{/* One release is one run. */}}
{{- define "tuning.cluster.unchanged" -}}
{{- $job := lookup "batch.volcano.sh/v1alpha1" "Job" .Release.Namespace .Release.Name -}}
{{- if not $job -}}
{{- fail (printf "upgrade: got no Job %s: the run has ended, or was never started, and an upgrade would start it unchecked; uninstall the release, or install another" .Release.Name) -}}
{{- end -}}
{{- $annotations := dig "metadata" "annotations" (dict) $job -}}
{{- if ne (get $annotations "preference-tuning/frozen") (include "tuning.frozen" . | sha256sum) -}}
{{- $before := get $annotations "preference-tuning/values" | fromJson -}}
{{- $differ := list -}}
{{- range $key, $hash := include "tuning.frozen.values" . | fromJson -}}
{{- if ne $hash (get $before $key | toString) -}}{{- $differ = append $differ $key -}}{{- end -}}
{{- end -}}
{{- fail (printf "upgrade: got another run than %s has (%s), expected the same: a Volcano Job, its queue and its storage can't be changed; install a new release with a name of its own" .Release.Name (join ", " $differ | default "the chart's version")) -}}
{{- end -}}
{{- end }}
