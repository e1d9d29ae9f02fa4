{{/* Everything of a release that an upgrade can't change: the Job, the Queue and the storage; of a file system of its own
also whether it is kept, which a StorageClass says once and for all. */}}
{{- define "tuning.frozen" -}}
{{- include "tuning.job" . -}}
{{- if not .Values.queue.existing -}}{{ include "tuning.queue" . }}{{- end -}}
{{- omit .Values.storage "keep" "trainedBillions" "saveSeconds" | toJson -}}
{{- if eq (include "tuning.storage.mode" .) "dynamic" -}}{{ .Values.storage.keep }}{{- end -}}
{{- end }}

{{/* A hash for each key of the values, kept with the Job so that a refusal can name those that differ. */}}
{{- define "tuning.frozen.values" -}}
{{- $hashes := dict -}}
{{- range $key, $value := .Values -}}
{{- $_ := set $hashes $key (toJson $value | sha256sum | trunc 8) -}}
{{- end -}}
{{ toJson $hashes }}
{{- end }}
