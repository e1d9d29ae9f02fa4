{{/* What of the Job may not change while it is there. */}}
{{- define "tuning.job" -}}
schedulerName: volcano
queue: {{ include "tuning.queue.name" . | quote }}
minAvailable: {{ int .Values.nodes }}
maxRetry: {{ int .Values.gang.maxRetry }}
ttlSecondsAfterFinished: {{ int .Values.gang.ttlSecondsAfterFinished }}
plugins:
  env: []
  svc: [--publish-not-ready-addresses=true, --disable-network-policy=true]
# The first that fits counts. No policy for TaskCompleted: a task is one pod, and the first to end would end the others.
policies:
  - exitCode: 64
    action: AbortJob
  - events: [PodEvicted, PodFailed]
    action: RestartJob
tasks:
  {{- range $slot := until (int .Values.nodes) }}
  - name: node{{ $slot }}
    replicas: 1
    minAvailable: 1 # this and maxRetry as Volcano fills them in: left out, an upgrade would take them away
    maxRetry: 3
    template: {{- include "tuning.pod" (dict "root" $ "slot" $slot) | nindent 6 }}
  {{- end }}
{{- end }}

{{- define "tuning.queue" -}}
weight: {{ int .Values.queue.weight }}
reclaimable: {{ .Values.queue.reclaimable }}
{{- if .Values.queue.parent }}
parent: {{ .Values.queue.parent | quote }}
{{- end }}
capability:
  {{- if .Values.gpusPerNode }}
  nvidia.com/gpu: {{ mul (int .Values.nodes) (int .Values.gpusPerNode) | quote }}
  {{- else }}
  cpu: {{ mul (int .Values.nodes) (include "tuning.pod.cpu" . | int) | quote }}
  {{- end }}
{{- end }}
