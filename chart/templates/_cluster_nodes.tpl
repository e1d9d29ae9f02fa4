{{/* What the cluster must have for nodes to come, and to be of use. */}}

{{/* The action enqueue lets no pod be made before the cluster could hold the gang; with no pod no node is bought. */}}
{{- define "tuning.cluster.scheduler" -}}
{{- $found := lookup "v1" "ConfigMap" $.Values.clusterChecks.volcanoNamespace $.Values.clusterChecks.volcanoConfigMap -}}
{{- if not $found -}}
{{- fail (printf "clusterChecks.volcanoConfigMap: got %s, expected the ConfigMap of Volcano's scheduler in namespace %s: whether it can start a gang from zero nodes is read there; name it and its namespace (clusterChecks.volcanoNamespace)" $.Values.clusterChecks.volcanoConfigMap $.Values.clusterChecks.volcanoNamespace) -}}
{{- end -}}
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

{{/* EFA's plugin tolerates no taint by itself. To Karpenter a node that never reports its devices has never started: it is
paid for, never used, and never given back as empty. */}}
{{- define "tuning.cluster.efa" -}}
{{- if ne (include "tuning.pod.efa" .) "0" -}}
{{- $found := false -}}
{{- range $set := (lookup "apps/v1" "DaemonSet" "" "").items -}}
{{- $found = or $found (contains "efa-k8s-device-plugin" $set.metadata.name) -}}
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
{{- if and (not $found) (eq .Values.nodeClass.group "karpenter.k8s.aws") -}}
{{- fail (printf "cluster: got no DaemonSet *efa-k8s-device-plugin*, expected EFA's device plugin for the %s devices of each pod (resources.efa): nodes would be bought, never report them and never be given back; install aws-efa-k8s-device-plugin, or, where it has another name, write clusterChecks.enabled: false" (include "tuning.pod.efa" .)) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* A node class of the platform's; its kind may be another provider's, in any version that the cluster serves. */}}
{{- define "tuning.cluster.nodeClass.existing" -}}
{{- $kind := .Values.nodeClass.kind -}}
{{- $name := .Values.nodeClass.name -}}
{{- $found := has (printf "%s/%s" $kind $name) (include "tuning.cluster.brought" . | fromJsonArray) -}}
{{- range .Capabilities.APIVersions -}}
{{- $parts := splitList "/" . -}}
{{- if and (eq (first $parts) $.Values.nodeClass.group) (eq (last $parts) $kind) -}}
{{- $found = or $found (lookup (printf "%s/%s" (first $parts) (index $parts 1)) $kind "" $name) -}}
{{- end -}}
{{- end -}}
{{- if not $found -}}
{{- fail (printf "nodeClass.name: got %s, expected a node class of the cluster, of kind %s in %s: no node would ever come; create it, or name another (nodeClass.group, nodeClass.kind)" $name $kind $.Values.nodeClass.group) -}}
{{- end -}}
{{- end }}

{{/* Fields that came with Karpenter 1.11; an API server that does not know them drops them without a word. */}}
{{- define "tuning.cluster.nodeClass" -}}
{{- $fields := dict -}}
{{- if and .Values.nodeClass.create .Values.nodeClass.placementGroup -}}{{- $_ := set $fields "placementGroupSelector" "placementGroup" -}}{{- end -}}
{{- if and .Values.nodeClass.create .Values.nodeClass.networkInterfaces -}}{{- $_ := set $fields "networkInterfaces" "networkInterfaces" -}}{{- end -}}
{{- range $field, $key := $fields -}}
{{- $definition := lookup "apiextensions.k8s.io/v1" "CustomResourceDefinition" "" "ec2nodeclasses.karpenter.k8s.aws" -}}
{{- range dig "spec" "versions" list $definition -}}
{{- if and (eq .name "v1") (not (hasKey (dig "schema" "openAPIV3Schema" "properties" "spec" "properties" dict .) $field)) -}}
{{- fail (printf "nodeClass.%s: got some, expected none: this cluster's EC2NodeClass has no %s, and would drop it; install Karpenter 1.11 or later with its CRDs, or remove it" $key $field) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* A pool that is there gives nodes to slots only if it names their label; that of another release gives none. */}}
{{- define "tuning.cluster.slots" -}}
{{- $label := .Values.gang.slotLabel -}}
{{- if and $label (.Capabilities.APIVersions.Has "karpenter.sh/v1/NodePool") -}}
{{- $keys := list -}}
{{- range (lookup "karpenter.sh/v1" "NodePool" "" "").items -}}
{{- if ne (dig "labels" "app.kubernetes.io/name" "" .metadata) $.Chart.Name -}}
{{- range .spec.template.spec.requirements -}}{{- $keys = append $keys .key -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- if not (has $label $keys) -}}
{{- fail (printf "gang.slotLabel: got %s, which no NodePool of the platform's requires: the pods would wait for ever; add {key: %s, operator: Exists} to its requirements, or write slotLabel: \"\"" $label $label) -}}
{{- end -}}
{{- end -}}
{{- end }}
