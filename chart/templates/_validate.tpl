{{/* What must hold between values, checked before anything is sent. Messages: where, what was got, what was expected and
why, what to do. What one value alone may be is in values.schema.json. */}}
{{- define "tuning.validate" -}}
{{- include "tuning.validate.release" . -}}
{{- include "tuning.validate.nodes" . -}}
{{- include "tuning.validate.watcher" . -}}
{{- include "tuning.validate.resources" . -}}
{{- include "tuning.validate.storage" . -}}
{{- include "tuning.validate.places" . -}}
{{- include "tuning.validate.grace" . -}}
{{- include "tuning.validate.existing" . -}}
{{- include "tuning.validate.pods" . -}}
{{- end }}

{{- define "tuning.validate.release" -}}
{{- if not (dig "method" "name" "" .Values.training) -}}
{{- fail "training.method.name: got nothing, expected grpo or dpo; give it" -}}
{{- end -}}
{{- if not (regexMatch "^[a-z][-a-z0-9]*$" .Release.Name) -}}
{{- fail (printf "release name: got %q, expected a letter, then letters, digits and dashes: the pods' host names follow from it; choose another" .Release.Name) -}}
{{- end -}}
{{- if and (eq .Values.image.tag "latest") (not .Values.image.digest) -}}
{{- fail "image.tag: got latest, expected a version: a run that restarts must find the same program; give a tag or image.digest" -}}
{{- end -}}
{{- $ranges := dict "gpuHour" (list .Values.cost.gpuHour.low .Values.cost.gpuHour.high) "hours" (list .Values.cost.hours.low .Values.cost.hours.high) -}}
{{- range $name, $range := $ranges -}}
{{- if gt (first $range | float64) (last $range | float64) -}}
{{- fail (printf "cost.%s: got low %v above high %v; exchange them" $name (first $range) (last $range)) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* What is the platform's can't be ours too. */}}
{{- define "tuning.validate.existing" -}}
{{- if and $.Values.queue.existing (or $.Values.queue.parent $.Values.queue.reclaimable (ne (int $.Values.queue.weight) 1)) -}}
{{- fail (printf "queue: got existing %q with weight, parent or reclaimable, expected it alone: a queue that is there is not changed; remove the others" $.Values.queue.existing) -}}
{{- end -}}
{{- if eq $.Values.queue.existing "root" -}}
{{- fail "queue.existing: got root, expected a queue below it: Volcano lets no Job into root; name another" -}}
{{- end -}}
{{- if and (not $.Values.serviceAccount.create) (not $.Values.serviceAccount.name) -}}
{{- fail "serviceAccount.name: got nothing, expected the name of the existing account that serviceAccount.create: false asks for; give it" -}}
{{- end -}}
{{- if and $.Values.serviceAccount.create (eq $.Values.serviceAccount.name "default") -}}
{{- fail "serviceAccount.name: got default, expected another: each namespace has that one already; rename it, or write create: false" -}}
{{- end -}}
{{- if and (not $.Values.serviceAccount.create) $.Values.serviceAccount.annotations -}}
{{- fail "serviceAccount.annotations: got some with serviceAccount.create: false, expected none: an account that is there is not changed; remove them" -}}
{{- end -}}
{{- end }}

{{/* What is added to the pods must not undo what the chart says there. */}}
{{- define "tuning.validate.pods" -}}
{{- $own := list "NNODES" "NODE_RANK" "MASTER_ADDR" "MASTER_PORT" "RESTART_COUNT" "RUN_NAME" "WORLD_SIZE" "RANK" "LOCAL_RANK" -}}
{{- $seen := list -}}
{{- range .Values.extraEnv -}}
{{- if has .name $own -}}
{{- fail (printf "extraEnv: got %s, which the chart or the launcher sets itself; remove it" .name) -}}
{{- end -}}
{{- if has .name $seen -}}
{{- fail (printf "extraEnv: got %s twice, expected each name once; remove one" .name) -}}
{{- end -}}
{{- $seen = append $seen .name -}}
{{- end -}}
{{- $volumes := list "run" "storage" "tmp" "shm" -}}
{{- range .Values.extraVolumes -}}
{{- if has (get . "name") $volumes -}}
{{- fail (printf "extraVolumes: got the name %q, which is taken; rename it" .name) -}}
{{- end -}}
{{- if hasKey . "hostPath" -}}
{{- fail (printf "extraVolumes: got hostPath for %q, expected another kind: Pod Security restricted does not admit it; use a claim" (get . "name")) -}}
{{- end -}}
{{- $volumes = append $volumes (get . "name") -}}
{{- end -}}
{{- range .Values.extraVolumeMounts -}}
{{- if not (has .name (slice $volumes 4)) -}}
{{- fail (printf "extraVolumeMounts: got the volume %q, expected one of extraVolumes (%s); add it there" .name (slice $volumes 4 | join ", " | default "none")) -}}
{{- end -}}
{{- if has .mountPath (list "/etc/run" "/tmp" "/dev/shm" $.Values.storage.mountPath) -}}
{{- fail (printf "extraVolumeMounts: got the path %s, which is taken; mount %q elsewhere" .mountPath .name) -}}
{{- end -}}
{{- end -}}
{{- range $key, $_ := .Values.podLabels -}}
{{- if or (hasPrefix "app.kubernetes.io/" $key) (hasPrefix "volcano.sh/" $key) -}}
{{- fail (printf "podLabels: got %s, which the chart or Volcano sets itself; use another key" $key) -}}
{{- end -}}
{{- end -}}
{{- if has .Values.storage.mountPath (list "/etc/run" "/tmp" "/dev/shm" "/etc" "/dev" "/usr" "/opt" "/proc" "/sys") -}}
{{- fail (printf "storage.mountPath: got %s, expected a folder that the image does not use; give another, such as /checkpoints" .Values.storage.mountPath) -}}
{{- end -}}
{{- end }}
