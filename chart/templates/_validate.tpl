{{/* What must hold between values, checked before anything is sent. Messages: where, what was got, what was expected and
why, what to do. What one value alone may be is in values.schema.json. */}}
{{- define "tuning.validate" -}}
{{- include "tuning.validate.release" . -}}
{{- include "tuning.validate.nodes" . -}}
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

{{- define "tuning.validate.nodes" -}}
{{- if $.Values.nodePool.create -}}
{{- if ne (len $.Values.nodePool.zones) 1 -}}
{{- fail (printf "nodePool.zones: got %d (%s), expected one: EFA and FSx do not reach across zones, and a gang over two would never meet; name the zone of the file system" (len $.Values.nodePool.zones) (join ", " $.Values.nodePool.zones)) -}}
{{- end -}}
{{- if not .Values.gang.slotLabel -}}
{{- fail "gang.slotLabel: got nothing, expected a label key where the pool is the release's own: without it a gang does not come back after a spot loss; leave the default" -}}
{{- end -}}
{{- if regexMatch "^([^/]*\\.)?(kubernetes\\.io|k8s\\.io|karpenter\\.sh|k8s\\.aws)/" .Values.gang.slotLabel -}}
{{- fail (printf "gang.slotLabel: got %s, expected another domain: neither Karpenter nor a kubelet takes labels of this one; leave the default" .Values.gang.slotLabel) -}}
{{- end -}}
{{- if .Values.nodeClass.create -}}
{{- include "tuning.validate.nodeClass" . -}}
{{- else if not .Values.nodeClass.name -}}
{{- fail "nodeClass.name: got nothing, expected the name of the existing node class that nodeClass.create: false asks for; give it" -}}
{{- end -}}
{{- else if and .Values.gpusPerNode (not .Values.nodeSelector) (not .Values.affinity) -}}
{{- fail "nodeSelector: got nothing, expected labels of the GPU nodes where nodePool.create is false; give them, or affinity" -}}
{{- end -}}
{{- range $key := list "karpenter.sh/nodepool" .Values.gang.slotLabel -}}
{{- if and $key (hasKey $.Values.nodeSelector $key) (or $.Values.nodePool.create (eq $key $.Values.gang.slotLabel)) -}}
{{- fail (printf "nodeSelector: got %s, which the chart sets itself; remove it" $key) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "tuning.validate.nodeClass" -}}
{{- if or $.Values.nodeClass.name (ne $.Values.nodeClass.group "karpenter.k8s.aws") (ne $.Values.nodeClass.kind "EC2NodeClass") -}}
{{- fail (printf "nodeClass: got %s/%s %q, expected no group, kind or name with nodeClass.create: true, since they are of an existing one; write create: false or remove them" $.Values.nodeClass.group $.Values.nodeClass.kind $.Values.nodeClass.name) -}}
{{- end -}}
{{- if not (regexMatch "^(al2023@v20[0-9]{6}|bottlerocket@v?1\\.[0-9]+\\.[0-9]+)$" $.Values.nodeClass.amiAlias) -}}
{{- fail (printf "nodeClass.amiAlias: got %q, expected a version such as al2023@v20260903 or bottlerocket@v1.55.0: another one later would be an untested node; pin it" $.Values.nodeClass.amiAlias) -}}
{{- end -}}
{{- if and (has "reserved" .Values.nodePool.capacityTypes) (not $.Values.nodeClass.capacityReservations) -}}
{{- fail "nodeClass.capacityReservations: got none, expected a term where nodePool.capacityTypes has reserved; give an id or tags, or leave reserved out" -}}
{{- end -}}
{{- if and $.Values.nodeClass.capacityReservations (not (has "reserved" .Values.nodePool.capacityTypes)) -}}
{{- fail (printf "nodePool.capacityTypes: got %s, expected reserved among them where nodeClass.capacityReservations has a term; add it, or the reservation is paid for and not used" (join ", " .Values.nodePool.capacityTypes)) -}}
{{- end -}}
{{- $efa := 0 -}}
{{- range $.Values.nodeClass.networkInterfaces -}}
{{- if eq (get . "interfaceType") "efa-only" -}}{{- $efa = add $efa 1 -}}{{- end -}}
{{- end -}}
{{- if and $.Values.nodeClass.networkInterfaces (ne (toString $efa) (include "tuning.pod.efa" .)) -}}
{{- fail (printf "nodeClass.networkInterfaces: got %d of type efa-only, expected %s, as many as a pod asks for; change one or the other (resources.efa)" $efa (include "tuning.pod.efa" .)) -}}
{{- end -}}
{{- end }}

{{- define "tuning.validate.resources" -}}
{{- $table := .Files.Get "files/instances.yaml" | fromYaml -}}
{{- $gpus := int .Values.gpusPerNode -}}
{{- if and (eq $gpus 0) (or (kindIs "string" $.Values.resources.cpu) (kindIs "string" $.Values.resources.memoryGiB)) -}}
{{- fail "resources: got no cpu or no memoryGiB, expected both where gpusPerNode is 0: a share of a node is counted by its GPUs; give them" -}}
{{- end -}}
{{- range $type := .Values.nodePool.instanceTypes -}}
{{- $offer := get $table $type -}}
{{- if $offer -}}
{{- include "tuning.validate.instance" (dict "root" $ "type" $type "offer" $offer) -}}
{{- else if or (kindIs "string" $.Values.resources.cpu) (kindIs "string" $.Values.resources.memoryGiB) (and (kindIs "string" $.Values.resources.efa) (gt (int $.Values.nodes) 1) (gt $gpus 0)) -}}
{{- fail (printf "nodePool.instanceTypes: got %s, expected one of %s, whose resources are known; give resources.cpu, resources.memoryGiB and resources.efa for another" $type (keys $table | sortAlpha | join ", ")) -}}
{{- end -}}
{{- end -}}
{{- if and (eq $gpus 0) (ne (include "tuning.pod.efa" .) "0") -}}
{{- fail "resources.efa: got some, expected 0 where gpusPerNode is 0; remove it" -}}
{{- end -}}
{{- if ge (int $.Values.resources.sharedMemoryGiB) (include "tuning.pod.memoryGiB" . | int) -}}
{{- fail (printf "resources.sharedMemoryGiB: got %d, expected less than the pod's memory, %s GiB, which it is part of; lower it" (int $.Values.resources.sharedMemoryGiB) (include "tuning.pod.memoryGiB" .)) -}}
{{- end -}}
{{- end }}

{{/* Takes {root, type, offer}. */}}
{{- define "tuning.validate.instance" -}}
{{- $values := .root.Values -}}
{{- $gpus := int $values.gpusPerNode -}}
{{- if gt $gpus (int .offer.gpus) -}}
{{- fail (printf "gpusPerNode: got %d, expected at most %d, which %s has; lower it, or choose another type" $gpus (int .offer.gpus) .type) -}}
{{- end -}}
{{- if $values.nodePool.create -}}
{{- if ne $gpus (int .offer.gpus) -}}
{{- fail (printf "gpusPerNode: got %d, expected %d: a node of the release's own pool is one pod's, and the other GPUs of %s would be paid for and not used" $gpus (int .offer.gpus) .type) -}}
{{- end -}}
{{- $limits := dict "cpu" (div (int .offer.cpuMillis) 1000) "memoryGiB" (div (int .offer.memoryMiB) 1024) "efa" (int .offer.efa) -}}
{{- range $what, $limit := $limits -}}
{{- $asked := include (printf "tuning.pod.%s" $what) $.root | int -}}
{{- if gt $asked (int $limit) -}}
{{- fail (printf "resources.%s: got %d, expected at most %d, which %s offers: no node would ever fit; lower it" $what $asked (int $limit) $.type) -}}
{{- end -}}
{{- end -}}
{{- include "tuning.validate.disk" . -}}
{{- end -}}
{{- end }}

{{/* Images, logs and emptyDirs lie on the NVMe disks with RAID0, else on the root volume. Takes {root, offer, type}. */}}
{{- define "tuning.validate.disk" -}}
{{- $values := .root.Values -}}
{{- $need := add (include "tuning.pod.diskGiB" .root | int) 100 -}}
{{- $nvme := div (mul (int .offer.nvmeGB) 9) 10 -}}
{{- if and $values.nodeClass.create $values.nodeClass.instanceStorePolicy (gt $need $nvme) -}}
{{- fail (printf "resources.scratchGiB: got %d, with the rest of the pod %d GiB, expected at most %d, which the NVMe disks of %s hold; lower it, or storage.ephemeral.sizeGiB" (int $values.resources.scratchGiB) $need $nvme .type) -}}
{{- end -}}
{{- if and $values.nodeClass.create (not $values.nodeClass.instanceStorePolicy) (gt $need (int $values.nodeClass.rootVolumeGiB)) -}}
{{- fail (printf "nodeClass.rootVolumeGiB: got %d, expected at least %d for the image, logs and /tmp: without RAID0 nothing else holds them; raise it, or write instanceStorePolicy: RAID0" (int $values.nodeClass.rootVolumeGiB) $need) -}}
{{- end -}}
{{- end }}

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
{{- $grace := dig "checkpoint" "grace_seconds" 0 .Values.training | int -}}
{{- if gt (add $grace 15) $pod -}}
{{- fail (printf "gang.gracePeriodSeconds: got %d, expected at least %d, 15 more than training.checkpoint.grace_seconds: the pod would be killed while it saves; raise it" $pod (add $grace 15)) -}}
{{- end -}}
{{- if and (gt $grace 120) .Values.nodePool.create (has "spot" .Values.nodePool.capacityTypes) -}}
{{- fail (printf "training.checkpoint.grace_seconds: got %d, expected at most 120: a spot node ends two minutes after its notice; lower it" $grace) -}}
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
