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
{{- else if and .Values.gpusPerNode (not (include "tuning.selected" .Values.nodeSelector)) (not .Values.affinity) -}}
{{- fail "nodeSelector: got nothing, expected labels of the GPU nodes where nodePool.create is false; give them, or affinity" -}}
{{- end -}}
{{- range $key := list "karpenter.sh/nodepool" .Values.gang.slotLabel -}}
{{- if and $key (hasKey $.Values.nodeSelector $key) (or $.Values.nodePool.create (eq $key $.Values.gang.slotLabel)) -}}
{{- fail (printf "nodeSelector: got %s, which the chart sets itself; remove it" $key) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "tuning.validate.watcher" -}}
{{- if and .Values.gang.waitTimeout (eq (include "tuning.seconds" .Values.gang.waitTimeout) "0") -}}
{{- fail (printf "gang.waitTimeout: got %s, expected a time in which nodes can come; raise it, or write \"\" to wait for ever" .Values.gang.waitTimeout) -}}
{{- end -}}
{{- if and (include "tuning.watcher.wanted" .) .Values.nodePool.create (le (include "tuning.seconds" .Values.gang.retryAfter | int) (include "tuning.seconds" .Values.nodePool.consolidateAfter | int)) -}}
{{- fail (printf "gang.retryAfter: got %s, expected more than nodePool.consolidateAfter (%s): a gang would be resumed before the nodes that it gives back are gone; raise it" .Values.gang.retryAfter .Values.nodePool.consolidateAfter) -}}
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
