{{/* Cluster-wide objects carry the namespace too: a release's name is its own within its namespace only. Helm's release
names have no dot here (tuning.validate), so the dot keeps a.b-c and a-b.c apart. */}}
{{- define "tuning.cluster.name" -}}
{{- $name := printf "%s.%s" .Release.Name .Release.Namespace -}}
{{- if le (len $name) 63 -}}
{{ $name }}
{{- else -}}
{{ regexReplaceAll "[-.]+$" (trunc 52 $name) "" }}-{{ sha256sum $name | trunc 10 }}
{{- end -}}
{{- end }}

{{/* What the release's pods and policies are found by. */}}
{{- define "tuning.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "tuning.labels" -}}
{{ include "tuning.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | quote }}
{{- end }}

{{/* Annotations of what preflight needs before the release has it; gone when preflight has ended, well or not. */}}
{{- define "tuning.hook.copy" -}}
helm.sh/hook: pre-install
helm.sh/hook-weight: "-10"
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}

{{/* Labels of nodes without those of null: Helm deletes a default by null, but keeps the null with --reuse-values. */}}
{{- define "tuning.selected" -}}
{{- range $key, $value := . -}}
{{- if not (kindIs "invalid" $value) }}
{{ $key | quote }}: {{ $value | quote }}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Takes {root, image}. */}}
{{- define "tuning.image" -}}
{{- $repository := .image.repository -}}
{{- if .root.Values.global.imageRegistry -}}
{{- $path := regexReplaceAll "^([^/]*[.:][^/]*|localhost)/" $repository "" -}}
{{- $repository = printf "%s/%s" .root.Values.global.imageRegistry $path -}}
{{- end -}}
{{- if .image.digest -}}
{{ $repository }}@{{ .image.digest }}
{{- else if .image.tag -}}
{{ $repository }}:{{ .image.tag }}
{{- else -}}
{{ $repository }}:{{ .root.Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "tuning.queue.name" -}}
{{- if .Values.queue.existing -}}{{ .Values.queue.existing }}{{- else -}}{{ include "tuning.cluster.name" . }}{{- end -}}
{{- end }}

{{- define "tuning.serviceAccount.name" -}}
{{- if .Values.serviceAccount.name -}}{{ .Values.serviceAccount.name }}{{- else -}}{{ .Release.Name }}{{- end -}}
{{- end }}

{{- define "tuning.nodeClass.name" -}}
{{- if .Values.nodeClass.create -}}{{ include "tuning.cluster.name" . }}{{- else -}}{{ .Values.nodeClass.name }}{{- end -}}
{{- end }}

{{/* Tags by which Karpenter's getting-started guide finds subnets and security groups; takes {root, tags}. */}}
{{- define "tuning.nodeClass.tags" -}}
{{- if .tags -}}{{ toYaml .tags }}{{- else -}}karpenter.sh/discovery: {{ .root.Values.cluster.name | quote }}{{- end -}}
{{- end }}

{{/* Of a time such as 1h30m. */}}
{{- define "tuning.seconds" -}}
{{- $seconds := 0 -}}
{{- range regexFindAll "[0-9]+[hms]" . -1 -}}
{{- $unit := trimAll "0123456789" . -}}
{{- $seconds = trimSuffix $unit . | atoi | mul (get (dict "h" 3600 "m" 60 "s" 1) $unit) | add $seconds -}}
{{- end -}}
{{ $seconds }}
{{- end }}

{{/* existing, ephemeral, static (an FSx file system that is there) or dynamic (one that comes with the release). */}}
{{- define "tuning.storage.mode" -}}
{{- if .Values.storage.existingClaim -}}existing
{{- else if .Values.storage.ephemeral.enabled -}}ephemeral
{{- else if .Values.storage.fsx.fileSystemId -}}static
{{- else -}}dynamic
{{- end -}}
{{- end }}

{{- define "tuning.storage.claim" -}}
{{- if .Values.storage.existingClaim -}}{{ .Values.storage.existingClaim }}{{- else -}}{{ .Release.Name }}{{- end -}}
{{- end }}

{{/* An FSx file system that is there; takes {root, claim}. */}}
{{- define "tuning.storage.volume" -}}
capacity:
  storage: {{ int .root.Values.storage.fsx.capacityGiB }}Gi
accessModes: [ReadWriteMany]
persistentVolumeReclaimPolicy: Retain
storageClassName: ""
mountOptions: [flock]
claimRef:
  namespace: {{ .root.Release.Namespace | quote }}
  name: {{ .claim | quote }}
csi:
  driver: fsx.csi.aws.com
  volumeHandle: {{ .root.Values.storage.fsx.fileSystemId | quote }}
  volumeAttributes:
    dnsname: {{ .root.Values.storage.fsx.dnsName | quote }}
    mountname: {{ .root.Values.storage.fsx.mountName | quote }}
{{- end }}

{{/* run.yaml: the training values unchanged, laid over the trainer's own defaults. */}}
{{- define "tuning.run" -}}
defaults:
  - base
  - override method: {{ dig "method" "name" "" .Values.training }}
  - _self_
{{ toYaml .Values.training }}
{{- end }}

{{/* The hash is part of the name, so that a half-done upgrade can't change what a restarting pod reads. */}}
{{- define "tuning.run.configMap" -}}
{{ .Release.Name }}-{{ include "tuning.run" . | sha256sum | trunc 10 }}
{{- end }}

{{/* What the smallest of the instance types offers; {} where none of them is in the table. */}}
{{- define "tuning.instance" -}}
{{- $table := .Files.Get "files/instances.yaml" | fromYaml -}}
{{- $least := dict -}}
{{- range .Values.nodePool.instanceTypes -}}
{{- if hasKey $table . -}}
{{- range $what, $amount := get $table . -}}
{{- $_ := set $least $what (hasKey $least $what | ternary (get $least $what) $amount | int | min (int $amount)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{ toYaml $least }}
{{- end }}

{{/* A pod's share of its node, by its GPUs; what daemons need is left to them. Takes {root, what, spare, unit}. */}}
{{- define "tuning.pod.share" -}}
{{- $instance := include "tuning.instance" .root | fromYaml -}}
{{- $offered := sub (int (get $instance .what)) .spare -}}
{{ div (div (mul $offered (int .root.Values.gpusPerNode)) (int $instance.gpus)) .unit }}
{{- end }}

{{- define "tuning.pod.cpu" -}}
{{- if kindIs "string" .Values.resources.cpu -}}
{{ include "tuning.pod.share" (dict "root" . "what" "cpuMillis" "spare" 2000 "unit" 1000) }}
{{- else -}}
{{ int .Values.resources.cpu }}
{{- end -}}
{{- end }}

{{- define "tuning.pod.memoryGiB" -}}
{{- if kindIs "string" .Values.resources.memoryGiB -}}
{{ include "tuning.pod.share" (dict "root" . "what" "memoryMiB" "spare" 32768 "unit" 1024) }}
{{- else -}}
{{ int .Values.resources.memoryGiB }}
{{- end -}}
{{- end }}

{{- define "tuning.pod.efa" -}}
{{- if not (kindIs "string" .Values.resources.efa) -}}
{{ int .Values.resources.efa }}
{{- else if or (eq (int .Values.nodes) 1) (eq (int .Values.gpusPerNode) 0) -}}
0
{{- else -}}
{{ include "tuning.pod.share" (dict "root" . "what" "efa" "spare" 0 "unit" 1) }}
{{- end -}}
{{- end }}

{{/* Disk of the node in GiB: /tmp, the checkpoints where they lie there, and 10 for logs. */}}
{{- define "tuning.pod.diskGiB" -}}
{{- $disk := add (int .Values.resources.scratchGiB) 10 -}}
{{- if eq (include "tuning.storage.mode" .) "ephemeral" -}}
{{- $disk = add $disk (int .Values.storage.ephemeral.sizeGiB) -}}
{{- end -}}
{{ $disk }}
{{- end }}

{{- define "tuning.pod.resources" -}}
cpu: {{ include "tuning.pod.cpu" . | quote }}
memory: {{ include "tuning.pod.memoryGiB" . }}Gi
ephemeral-storage: {{ include "tuning.pod.diskGiB" . }}Gi
{{- if .Values.gpusPerNode }}
nvidia.com/gpu: {{ int .Values.gpusPerNode | quote }}
{{- end }}
{{- if ne (include "tuning.pod.efa" .) "0" }}
vpc.amazonaws.com/efa: {{ include "tuning.pod.efa" . | quote }}
{{- end }}
{{- end }}
