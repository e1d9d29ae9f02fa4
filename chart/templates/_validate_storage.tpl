{{- define "tuning.validate.storage" -}}
{{- $mode := include "tuning.storage.mode" . -}}
{{- $checkpoint := dig "checkpoint" (dict) .Values.training -}}
{{- if and $.Values.storage.existingClaim $.Values.storage.ephemeral.enabled -}}
{{- fail (printf "storage.ephemeral.enabled: got true with storage.existingClaim %q, expected one place for checkpoints; remove one of them" $.Values.storage.existingClaim) -}}
{{- end -}}
{{- if and $.Values.storage.fsx.fileSystemId (ne $mode "static") -}}
{{- fail (printf "storage.fsx.fileSystemId: got %q with storage.existingClaim or storage.ephemeral, expected one place for checkpoints; remove one of them" $.Values.storage.fsx.fileSystemId) -}}
{{- end -}}
{{- if and (eq $mode "static") (not (and $.Values.storage.fsx.dnsName $.Values.storage.fsx.mountName)) -}}
{{- fail (printf "storage.fsx: got %s without dnsName or mountName, expected both; take them from `aws fsx describe-file-systems --file-system-ids %s`" $.Values.storage.fsx.fileSystemId $.Values.storage.fsx.fileSystemId) -}}
{{- end -}}
{{- if and (ne $mode "static") (or $.Values.storage.fsx.dnsName $.Values.storage.fsx.mountName) -}}
{{- fail "storage.fsx: got dnsName or mountName without fileSystemId, expected all three for a file system that is there; give it, or remove them" -}}
{{- end -}}
{{- if and (eq $mode "ephemeral") (gt (int .Values.nodes) 1) -}}
{{- fail (printf "storage.ephemeral.enabled: got true with %d nodes, expected a file system that all of them see; give storage.existingClaim or storage.fsx" (int .Values.nodes)) -}}
{{- end -}}
{{- if and (eq $mode "ephemeral") .Values.gpusPerNode (not (get $checkpoint "mirror")) -}}
{{- fail "training.checkpoint.mirror: got nothing with storage.ephemeral, expected s3://: a node that is lost takes its disk with it, and the run would start anew; give it" -}}
{{- end -}}
{{- if and (has "spot" .Values.nodePool.capacityTypes) .Values.nodePool.create (gt (int $.Values.storage.saveSeconds) 120) -}}
{{- fail (printf "storage.saveSeconds: got %d, expected at most 120: a spot node ends two minutes after its notice; lower it" (int $.Values.storage.saveSeconds)) -}}
{{- end -}}
{{- if and (eq $mode "dynamic") (has "spot" .Values.nodePool.capacityTypes) .Values.nodePool.create (gt (include "tuning.save.seconds" . | float64) (float64 $.Values.storage.saveSeconds)) -}}
{{- fail (printf "storage.fsx: got a file system that takes a checkpoint of %s GB in %s s (%s), expected at most %v s: a spot notice leaves two minutes; raise storage.fsx.capacityGiB or throughputPerTiB" (include "tuning.save.GB" .) (include "tuning.save.seconds" .) (include "tuning.save.speed" .) $.Values.storage.saveSeconds) -}}
{{- end -}}
{{- end }}

{{/* Where a run reads and writes: the pods' root file system is read-only. */}}
{{- define "tuning.validate.places" -}}
{{- $training := .Values.training -}}
{{- $mount := .Values.storage.mountPath -}}
{{- $mode := include "tuning.storage.mode" . -}}
{{- $output := dig "output" "path" "" $training -}}
{{- $checkpoints := dig "checkpoint" "path" "" $training -}}
{{- $remote := regexMatch "^s3a?://" $output -}}
{{- if and $remote (not $checkpoints) -}}
{{- fail (printf "training.checkpoint.path: got nothing, expected a folder in %s, the storage that all pods see, since training.output.path is on S3; give %s/${oc.env:RUN_NAME}" $mount $mount) -}}
{{- end -}}
{{- if and $checkpoints (not (hasPrefix (printf "%s/" $mount) $checkpoints)) -}}
{{- fail (printf "training.checkpoint.path: got %q, expected a folder in %s, where the storage is mounted (storage.mountPath); give %s/${oc.env:RUN_NAME}" $checkpoints $mount $mount) -}}
{{- end -}}
{{- if not (or $remote (hasPrefix (printf "%s/" $mount) $output)) -}}
{{- fail (printf "training.output.path: got %q, expected s3:// or a folder in %s: everything else is gone with the pod; give one of them" $output $mount) -}}
{{- end -}}
{{- if and (eq $mode "ephemeral") .Values.gpusPerNode (not $remote) -}}
{{- fail (printf "training.output.path: got %q with storage.ephemeral, expected s3://: the model would be gone with the node; give it" $output) -}}
{{- end -}}
{{- $writable := list $mount "/tmp" -}}
{{- range .Values.extraVolumeMounts -}}{{- $writable = append $writable .mountPath -}}{{- end -}}
{{- range $key := list "data" "model" -}}
{{- $cache := dig $key "cache_path" "" $training -}}
{{- $inside := "" -}}
{{- range $writable -}}{{- if hasPrefix (printf "%s/" .) (printf "%s/" $cache) -}}{{- $inside = . -}}{{- end -}}{{- end -}}
{{- if and $cache (not $inside) -}}
{{- fail (printf "training.%s.cache_path: got %q, expected a folder in %s: nothing else in a pod can be written to; move it, or mount a volume there (extraVolumeMounts)" $key $cache (join " or " $writable)) -}}
{{- end -}}
{{- $path := dig $key "path" "" $training -}}
{{- if and (eq $mode "dynamic") (kindIs "string" $path) (hasPrefix (printf "%s/" $mount) $path) -}}
{{- fail (printf "training.%s.path: got %q, which is on the new, empty file system of the release; give s3://, or a file system that is there (storage.existingClaim, storage.fsx.fileSystemId)" $key $path) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "tuning.validate.grace" -}}
{{- $pod := int .Values.gang.gracePeriodSeconds -}}
{{- $grace := dig "checkpoint" "grace_seconds" 120 .Values.training | int -}}{{/* 120 as the trainer has it */}}
{{- if gt (add $grace 15) $pod -}}
{{- fail (printf "gang.gracePeriodSeconds: got %d, expected at least %d, 15 more than training.checkpoint.grace_seconds (%d): the pod would be killed while it saves; raise it, or give less there" $pod (add $grace 15) $grace) -}}
{{- end -}}
{{- if and (gt $grace 120) .Values.nodePool.create (has "spot" .Values.nodePool.capacityTypes) -}}
{{- fail (printf "training.checkpoint.grace_seconds: got %d, expected at most 120: a spot node ends two minutes after its notice; lower it" $grace) -}}
{{- end -}}
{{- end }}
