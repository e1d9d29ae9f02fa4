{{/* preflight's Job; takes {root, run: its ConfigMap, claim: "" where the storage is not there yet, queue: whether it
waits for the queue}. */}}
{{- define "tuning.preflight.job" -}}
{{- $root := .root -}}
{{- $checks := $root.Values.preflight.checks -}}
{{- if or (not .claim) (eq (include "tuning.storage.mode" $root) "ephemeral") -}}
{{- $checks = without $checks "checkpoint" -}}
{{- end -}}
backoffLimit: 0
# Later than its own, by what an image may take to be pulled: pods of a Job that is past this are gone, and their log.
activeDeadlineSeconds: {{ add (int $root.Values.preflight.deadlineSeconds) 50 }}
template:
  metadata: {{- include "tuning.pod.metadata" (dict "root" $root "component" "preflight") | nindent 4 }}
  spec:
    {{- include "tuning.pod.identity" $root | nindent 4 }}
    automountServiceAccountToken: {{ .queue }}
    {{- include "tuning.pod.ordinary" $root | nindent 4 }}
    containers:
      - name: preflight
        image: {{ include "tuning.image" (dict "root" $root "image" $root.Values.preflight.image) | quote }}
        imagePullPolicy: {{ $root.Values.image.pullPolicy }}
        command: [python, -m, entrypoint.preflight, --config-dir, /etc/run, --config-name, run]
        args:
          - --checks={{ join "," $checks }}
          - --deadline={{ int $root.Values.preflight.deadlineSeconds }}
          {{- if .queue }}
          - --queue={{ include "tuning.queue.name" $root }}
          {{- if and $root.Values.queue.existing $root.Values.gpusPerNode }}
          - --gpus={{ mul (int $root.Values.nodes) (int $root.Values.gpusPerNode) }}
          {{- end }}
          {{- if $root.Values.gang.slotLabel }}
          - --scheduler-config={{ $root.Values.clusterChecks.volcanoNamespace }}/{{ $root.Values.clusterChecks.volcanoConfigMap }}
          {{- end }}
          {{- end }}
        env: {{- include "tuning.pod.env" (dict "root" $root "chart" "[]") | trim | nindent 10 }}
        {{- if $root.Values.envFrom }}
        envFrom: {{- toYaml $root.Values.envFrom | nindent 10 }}
        {{- end }}
        resources:
          requests: {{- toYaml $root.Values.preflight.resources.requests | nindent 12 }}
          limits: {{- toYaml $root.Values.preflight.resources.limits | nindent 12 }}
        securityContext: {{- include "tuning.container.security" $root | nindent 10 }}
        volumeMounts: {{- include "tuning.pod.mounts" $root | nindent 10 }}
    volumes: {{- include "tuning.pod.volumes" (dict "root" $root "run" .run "claim" .claim "tmpGiB" 10) | nindent 6 }}
{{- end }}

{{/* The claim that preflight can use before the release is there; empty where there is none. */}}
{{- define "tuning.preflight.claim" -}}
{{- $mode := include "tuning.storage.mode" . -}}
{{- if eq $mode "existing" -}}{{ .Values.storage.existingClaim }}
{{- else if eq $mode "static" -}}{{ .Release.Name }}-preflight
{{- end -}}
{{- end }}
