{{/* Everything of a release that an upgrade can't change: the Job, the Queue, the storage, and the zone, outside which a
node bought later would never meet the others; of a file system of its own also whether it is kept, which a StorageClass
says once and for all. */}}
{{- define "tuning.frozen" -}}
{{- include "tuning.job" . -}}
{{- if not .Values.queue.existing -}}{{ include "tuning.queue" . }}{{- end -}}
{{- omit .Values.storage "keep" "trainedBillions" "saveSeconds" | toJson -}}
{{- if eq (include "tuning.storage.mode" .) "dynamic" -}}{{ .Values.storage.keep }}{{- end -}}
{{- if .Values.nodePool.create -}}{{ toJson .Values.nodePool.zones }}{{- end -}}
{{- end }}

{{/* A hash for each value that enters the above, kept with the Job so that a refusal can name those that differ. */}}
{{- define "tuning.frozen.values" -}}
{{- $free := list "cluster." "clusterChecks." "cost." "extraObjects." "networkPolicy." "nodeClass." "preflight." "rbac." -}}
{{- $free = concat $free (list "gang.priorityClassName." "gang.retries." "gang.retryAfter." "gang.waitTimeout." "gang.watcherResources.") -}}
{{- $free = concat $free (list "nodePool.capacityTypes." "nodePool.consolidateAfter." "nodePool.expireAfter." "podMonitor.labels." "podMonitor.namespace.") -}}
{{- $free = concat $free (list "serviceAccount.annotations." "serviceAccount.create." "storage.saveSeconds." "storage.trainedBillions.") -}}
{{- if ne (include "tuning.storage.mode" .) "dynamic" -}}{{- $free = append $free "storage.keep." -}}{{- end -}}
{{- $hashes := dict -}}
{{- include "tuning.frozen.leaves" (dict "value" .Values "path" "" "free" $free "hashes" $hashes) -}}
{{ toJson $hashes }}
{{- end }}

{{/* Adds to `hashes` what lies below `path`, but for what begins with one of `free`; what is empty is left out.
Takes {value, path, free, hashes}. */}}
{{- define "tuning.frozen.leaves" -}}
{{- range $key, $value := .value -}}
{{- $path := printf "%s%s." $.path $key -}}
{{- $free := false -}}
{{- range $.free -}}{{- $free = or $free (hasPrefix . $path) -}}{{- end -}}
{{- if or $free (has (toJson $value) (list "null" "\"\"" "[]")) -}}
{{- else if kindIs "map" $value -}}
{{- include "tuning.frozen.leaves" (dict "value" $value "path" $path "free" $.free "hashes" $.hashes) -}}
{{- else -}}
{{- $_ := set $.hashes (trimSuffix "." $path) (toJson $value | sha256sum | trunc 8) -}}
{{- end -}}
{{- end -}}
{{- end }}
