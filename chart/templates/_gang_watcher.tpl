{{/* Not empty where nodes come for the gang and may wait for each other. */}}
{{- define "tuning.watcher.wanted" -}}
{{- if and .Values.gang.waitTimeout .Values.gang.slotLabel (gt (int .Values.nodes) 1) -}}
true
{{- end -}}
{{- end }}

{{/* Of its account, its rights and its record. */}}
{{- define "tuning.watcher.name" -}}
{{ .Release.Name }}-gang
{{- end }}

{{/* The hash is part of the name: a Job can't be changed, and an upgrade puts another in its place. */}}
{{- define "tuning.watcher.job.name" -}}
{{ trunc 47 .Release.Name | trimAll "-" }}-gang-{{ include "tuning.watcher.job" . | sha256sum | trunc 10 }}
{{- end }}

{{- define "tuning.watcher.selector" -}}
{{ include "tuning.selector" . }}
app.kubernetes.io/component: gang-watcher
{{- end }}

{{- define "tuning.watcher.job" -}}
backoffLimit: 20 # what goes wrong by itself passes; the record outlives the pod
podFailurePolicy:
  rules:
    - action: Ignore # its node is drained: another goes on
      onPodConditions:
        - {type: DisruptionTarget, status: "True"}
    - action: FailJob # it can't work
      onExitCodes: {operator: In, values: [64]}
template:
  metadata: {{- include "tuning.pod.metadata" (dict "root" . "component" "gang-watcher") | nindent 4 }}
  spec:
    serviceAccountName: {{ include "tuning.watcher.name" . | quote }}
    {{- include "tuning.pod.security" . | nindent 4 }}
    automountServiceAccountToken: true
    {{- include "tuning.pod.ordinary" . | nindent 4 }}
    containers:
      - name: gang-watcher
        image: {{ include "tuning.image" (dict "root" . "image" .Values.preflight.image) | quote }}
        imagePullPolicy: {{ .Values.image.pullPolicy }}
        command: [python, -m, entrypoint.gang]
        args:
          - --job={{ .Release.Namespace }}/{{ .Release.Name }}
          - --record={{ include "tuning.watcher.name" . }}
          - --wait-timeout={{ .Values.gang.waitTimeout }}
          - --retry-after={{ .Values.gang.retryAfter }}
          - --retries={{ int .Values.gang.retries }}
        terminationMessagePolicy: FallbackToLogsOnError
        resources:
          requests: {{- toYaml .Values.gang.watcherResources.requests | nindent 12 }}
          limits: {{- toYaml .Values.gang.watcherResources.limits | nindent 12 }}
        securityContext: {{- include "tuning.container.security" . | nindent 10 }}
{{- end }}
