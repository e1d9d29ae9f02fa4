{{/* What the cluster must have, asked where there is one: a real API server serves apiregistration.k8s.io, the set that
`helm template` and `helm lint` assume does not have it. */}}
{{- define "tuning.cluster.validate" -}}
{{- if .Capabilities.APIVersions.Has "apiregistration.k8s.io/v1" -}}
{{- include "tuning.cluster.kinds" . -}}
{{- include "tuning.cluster.subnet" . -}}
{{- if and (or .Values.clusterChecks.enabled .Release.IsUpgrade) (include "tuning.cluster.answers" .) -}}
{{- if .Values.clusterChecks.enabled -}}
{{- include "tuning.cluster.objects" . -}}
{{- end -}}
{{- if .Release.IsUpgrade -}}
{{- include "tuning.cluster.unchanged" . -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Not empty where lookups reach the cluster. A client's dry run, `helm template --validate` and Argo CD know its kinds,
but each lookup of theirs comes back empty. Every namespace has the ConfigMap, but one that this install is to make. */}}
{{- define "tuning.cluster.answers" -}}
{{- if or (lookup "v1" "ConfigMap" .Release.Namespace "kube-root-ca.crt") (lookup "v1" "Namespace" "" "kube-system") -}}
true
{{- end -}}
{{- end }}

{{- define "tuning.cluster.objects" -}}
{{- if .Values.gang.slotLabel -}}
{{- include "tuning.cluster.scheduler" . -}}
{{- end -}}
{{- if .Values.nodePool.create -}}
{{- include "tuning.cluster.efa" . -}}
{{- include "tuning.cluster.nodeClass" . -}}
{{- if not .Values.nodeClass.create -}}
{{- include "tuning.cluster.nodeClass.existing" . -}}
{{- end -}}
{{- else -}}
{{- include "tuning.cluster.slots" . -}}
{{- end -}}
{{- include "tuning.cluster.storage" . -}}
{{- include "tuning.cluster.account" . -}}
{{- include "tuning.cluster.named" . -}}
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

{{/* Kind/name of each of extraObjects, as a JSON list: what a release brings is not asked for. */}}
{{- define "tuning.cluster.brought" -}}
{{- $brought := list -}}
{{- range .Values.extraObjects -}}{{- $brought = append $brought (printf "%s/%s" .kind .metadata.name) -}}{{- end -}}
{{- toJson $brought -}}
{{- end }}

{{/* What each pod names, and would never start without. */}}
{{- define "tuning.cluster.named" -}}
{{- $brought := include "tuning.cluster.brought" . | fromJsonArray -}}
{{- $class := .Values.gang.priorityClassName -}}
{{- if and $class (not (has (printf "PriorityClass/%s" $class) $brought)) (not (lookup "scheduling.k8s.io/v1" "PriorityClass" "" $class)) -}}
{{- fail (printf "gang.priorityClassName: got %s, expected a PriorityClass of the cluster: the run would never start; create it, or name another" $class) -}}
{{- end -}}
{{- range .Values.image.pullSecrets -}}
{{- if not (or (has (printf "Secret/%s" .) $brought) (lookup "v1" "Secret" $.Release.Namespace .)) -}}
{{- fail (printf "image.pullSecrets: got %s, expected a Secret of namespace %s; create it, or remove the name" . $.Release.Namespace) -}}
{{- end -}}
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
{{- $now := include "tuning.frozen.values" . | fromJson -}}
{{- $differ := list -}}
{{- range $key := concat (keys $before) (keys $now) | uniq | sortAlpha -}}
{{- if ne (get $before $key) (get $now $key) -}}{{- $differ = append $differ $key -}}{{- end -}}
{{- end -}}
{{- $keep := "" -}}
{{- if and .Values.storage.keep (eq (include "tuning.storage.mode" .) "dynamic") (has "storage.keep" $differ) -}}
{{- $keep = printf "; to keep its file system, kubectl -n %s get pvc %s -o jsonpath='{.spec.volumeName}', then kubectl patch pv THAT_NAME -p '{\"spec\": {\"persistentVolumeReclaimPolicy\": \"Retain\"}}'" .Release.Namespace .Release.Name -}}
{{- end -}}
{{- fail (printf "upgrade: got another run than %s has (%s), expected the same: a Volcano Job, its queue, storage and zone can't be changed; install a new release with a name of its own%s" .Release.Name (join ", " $differ | default "the chart's version") $keep) -}}
{{- end -}}
{{- end }}
