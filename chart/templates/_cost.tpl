{{/* A checkpoint holds weights and both moments of AdamW in fp32: 12 bytes a trained parameter. */}}
{{- define "tuning.save.GB" -}}
{{ mulf .Values.storage.trainedBillions 12 | printf "%.0f" }}
{{- end }}

{{- define "tuning.save.MBps" -}}
{{ divf (mulf .Values.storage.fsx.capacityGiB .Values.storage.fsx.throughputPerTiB) 1024 | printf "%.0f" }}
{{- end }}

{{- define "tuning.save.speed" -}}
{{ divf .Values.storage.fsx.capacityGiB 1024 | printf "%.1f" }} TiB x {{ int .Values.storage.fsx.throughputPerTiB }} MB/s for each = {{ include "tuning.save.MBps" . }} MB/s
{{- end }}

{{- define "tuning.save.seconds" -}}
{{ divf (mulf .Values.storage.trainedBillions 12000) (include "tuning.save.MBps" . | float64) | printf "%.0f" }}
{{- end }}

{{/* Dollars for the GPUs of a run; takes {root, end: low or high}. */}}
{{- define "tuning.cost.gpus" -}}
{{- $values := .root.Values -}}
{{- $hours := eq .end "low" | ternary $values.cost.hours.low $values.cost.hours.high -}}
{{ mulf $values.nodes $values.gpusPerNode (eq .end "low" | ternary $values.cost.gpuHour.low $values.cost.gpuHour.high) $hours }}
{{- end }}

{{/* Dollars for a day of the file system that comes with the release; a month has 730 hours. */}}
{{- define "tuning.cost.fsxDay" -}}
{{ divf (mulf .Values.storage.fsx.capacityGiB .Values.cost.fsxGBMonth 24) 730 }}
{{- end }}

{{/* Dollars for that file system while a run lasts. */}}
{{- define "tuning.cost.fsx" -}}
{{- $values := .root.Values -}}
{{- if eq (include "tuning.storage.mode" .root) "dynamic" -}}
{{- $hours := eq .end "low" | ternary $values.cost.hours.low $values.cost.hours.high -}}
{{ divf (mulf (include "tuning.cost.fsxDay" .root | float64) $hours) 24 }}
{{- else -}}
0
{{- end -}}
{{- end }}

{{/* Dollars for a month of one checkpoint (12 bytes a trained parameter) and the model (2 bytes) on S3. */}}
{{- define "tuning.cost.s3" -}}
{{ mulf .root.Values.storage.trainedBillions 14 .root.Values.cost.s3GBMonth }}
{{- end }}

{{- define "tuning.cost.run" -}}
{{ addf (include "tuning.cost.gpus" . | float64) (include "tuning.cost.fsx" . | float64) (include "tuning.cost.s3" . | float64) }}
{{- end }}
