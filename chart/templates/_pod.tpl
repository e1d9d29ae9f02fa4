{{/* The pod of one slot; takes {root, slot}. */}}
{{- define "tuning.pod" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
metadata: {{- include "tuning.pod.metadata" (dict "root" $root "component" "trainer") | nindent 2 }}
spec:
  {{- include "tuning.pod.identity" $root | nindent 2 }}
  automountServiceAccountToken: false
  restartPolicy: Never
  terminationGracePeriodSeconds: {{ int $values.gang.gracePeriodSeconds }}
  nodeSelector: {{- include "tuning.pod.nodeSelector" (dict "root" $root "slot" $.slot) | nindent 4 }}
  {{- $tolerations := include "tuning.pod.tolerations" $root | fromYamlArray }}
  {{- if $tolerations }}
  tolerations: {{- toYaml $tolerations | nindent 4 }}
  {{- end }}
  {{- if $values.affinity }}
  affinity: {{- toYaml $values.affinity | nindent 4 }}
  {{- end }}
  containers:
    - name: trainer
      image: {{ include "tuning.image" (dict "root" $root "image" $values.image) | quote }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      command: [python, -m, entrypoint, --config-dir, /etc/run, --config-name, run]
      env: {{- include "tuning.pod.env" (dict "root" $root "chart" (include "tuning.pod.gang.env" (dict "root" $root "slot" $.slot))) | trim | nindent 8 }}
      {{- if $values.envFrom }}
      envFrom: {{- toYaml $values.envFrom | nindent 8 }}
      {{- end }}
      {{- if $values.podMonitor.enabled }}
      ports:
        - name: metrics
          containerPort: {{ int $values.podMonitor.port }}
      {{- end }}
      resources:
        requests: {{- include "tuning.pod.resources" $root | nindent 10 }}
        limits: {{- include "tuning.pod.resources" $root | nindent 10 }}
      terminationMessagePolicy: FallbackToLogsOnError
      securityContext: {{- include "tuning.container.security" $root | nindent 8 }}
      volumeMounts: {{- include "tuning.pod.mounts" $root | nindent 8 }}
        - name: shm
          mountPath: /dev/shm
  volumes: {{- include "tuning.pod.volumes" (dict "root" $root "run" (include "tuning.run.configMap" $root) "claim" (include "tuning.storage.claim" $root) "tmpGiB" $values.resources.scratchGiB) | nindent 4 }}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ int $values.resources.sharedMemoryGiB }}Gi
{{- end }}

{{/* What pods are found by; takes {root, component}. */}}
{{- define "tuning.pod.metadata" -}}
labels:
  {{- include "tuning.selector" .root | nindent 2 }}
  app.kubernetes.io/component: {{ .component }}
  {{- if .root.Values.podLabels }}
  {{- toYaml .root.Values.podLabels | nindent 2 }}
  {{- end }}
{{- if .root.Values.podAnnotations }}
annotations: {{- toYaml .root.Values.podAnnotations | nindent 2 }}
{{- end }}
{{- end }}

{{/* Who a pod is. */}}
{{- define "tuning.pod.identity" -}}
serviceAccountName: {{ include "tuning.serviceAccount.name" . | quote }}
{{ include "tuning.pod.security" . }}
{{- end }}

{{/* On an ordinary node: where preflight and the gang's watcher go, and what they bear there. */}}
{{- define "tuning.pod.ordinary" -}}
restartPolicy: Never
{{- $labels := include "tuning.selected" .Values.preflight.nodeSelector | fromYaml }}
{{- if $labels }}
nodeSelector: {{- toYaml $labels | nindent 2 }}
{{- end }}
{{- if .Values.preflight.tolerations }}
tolerations: {{- toYaml .Values.preflight.tolerations | nindent 2 }}
{{- end }}
{{- end }}

{{/* Pod Security "restricted", and how images are pulled. */}}
{{- define "tuning.pod.security" -}}
enableServiceLinks: false
{{- if .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range .Values.image.pullSecrets }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ int .Values.security.runAsUser }}
  runAsGroup: {{ int .Values.security.runAsGroup }}
  fsGroup: {{ int .Values.security.fsGroup }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- end }}

{{- define "tuning.container.security" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
readOnlyRootFilesystem: true
{{- end }}

{{/* The node made for this slot of this run. Without the slot, a pod that lost its node looks to Karpenter as if it
fitted beside another that waits, and no node is made. */}}
{{- define "tuning.pod.nodeSelector" -}}
{{- $labels := dict -}}
{{- if .root.Values.nodePool.create -}}
{{- $_ := set $labels "karpenter.sh/nodepool" (include "tuning.cluster.name" .root) -}}
{{- end -}}
{{- if .root.Values.gang.slotLabel -}}
{{- $_ := set $labels .root.Values.gang.slotLabel (toString .slot) -}}
{{- end -}}
{{ include "tuning.selected" .root.Values.nodeSelector | fromYaml | merge $labels | toYaml }}
{{- end }}

{{/* Those of the pool's taints, then the given ones. */}}
{{- define "tuning.pod.tolerations" -}}
{{- $tolerations := list -}}
{{- if .Values.nodePool.create -}}
{{- range .Values.nodePool.taints -}}
{{- $tolerations = append $tolerations (merge (dict "operator" (hasKey . "value" | ternary "Equal" "Exists")) .) -}}
{{- end -}}
{{- end -}}
{{ concat $tolerations .Values.tolerations | toYaml }}
{{- end }}

{{/* Environment of every container, then `chart` (a YAML list), then extraEnv, which wins; takes {root, chart}. */}}
{{- define "tuning.pod.env" -}}
{{- $given := list -}}
{{- range .root.Values.extraEnv -}}{{- $given = append $given .name -}}{{- end -}}
{{- $env := list (dict "name" "RUN_NAME" "value" .root.Release.Name) (dict "name" "HOME" "value" "/tmp") -}}
{{- range concat $env (fromYamlArray .chart) -}}
{{- if not (has .name $given) }}
- {{ toJson . }}
{{- end -}}
{{- end -}}
{{- range .root.Values.extraEnv }}
- {{ toRawJson . }}
{{- end -}}
{{- end }}

{{/* Where the ranks meet and how NCCL reaches the others; takes {root, slot}. */}}
{{- define "tuning.pod.gang.env" -}}
{{- $name := .root.Release.Name -}}
{{- $gpus := int .root.Values.gpusPerNode -}}
- {name: NNODES, value: {{ int .root.Values.nodes | quote }}}
- {name: NODE_RANK, value: {{ .slot | quote }}}
{{- if gt (int .root.Values.nodes) 1 }}
- {name: MASTER_ADDR, value: {{ printf "%s-node0-0.%s" $name $name | quote }}}
- {name: MASTER_PORT, value: "29500"}
- {name: GLOO_SOCKET_IFNAME, value: eth0}
{{- end }}
- {name: LOCAL_WORLD_SIZE, value: {{ max 1 $gpus | quote }}}
- {name: RESTART_COUNT, valueFrom: {fieldRef: {fieldPath: "metadata.annotations['volcano.sh/job-retry-count']"}}}
{{- if $gpus }}
- {name: NCCL_DEBUG, value: WARN}
- {name: NCCL_SOCKET_IFNAME, value: eth0}
- {name: TORCH_NCCL_ASYNC_ERROR_HANDLING, value: "1"}
- {name: TORCH_NCCL_DUMP_ON_TIMEOUT, value: "1"}
- {name: TORCH_FR_BUFFER_SIZE, value: "20000"}
- {name: PYTORCH_ALLOC_CONF, value: "expandable_segments:True"} # rows of another length each time would fragment memory
{{- end }}
{{- if ne (include "tuning.pod.efa" .root) "0" }}
- {name: FI_EFA_USE_HUGE_PAGE, value: "0"}
- {name: NCCL_NET, value: Libfabric} # EFA's plugin or none: NCCL would go on over TCP without a word
{{- end }}
{{- end }}

{{- define "tuning.pod.mounts" -}}
- name: run
  mountPath: /etc/run
  readOnly: true
- name: storage
  mountPath: {{ .Values.storage.mountPath | quote }}
- name: tmp
  mountPath: /tmp
{{- range .Values.extraVolumeMounts }}
- {{ toRawJson . }}
{{- end }}
{{- end }}

{{/* Takes {root, run: the ConfigMap, claim: "" for the node's disk, tmpGiB}. */}}
{{- define "tuning.pod.volumes" -}}
- name: run
  configMap:
    name: {{ .run | quote }}
- name: storage
  {{- if and .claim (ne (include "tuning.storage.mode" .root) "ephemeral") }}
  persistentVolumeClaim:
    claimName: {{ .claim | quote }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ int .root.Values.storage.ephemeral.sizeGiB }}Gi
  {{- end }}
- name: tmp
  emptyDir:
    sizeLimit: {{ int .tmpGiB }}Gi
{{- range .root.Values.extraVolumes }}
- {{ toRawJson . }}
{{- end }}
{{- end }}
