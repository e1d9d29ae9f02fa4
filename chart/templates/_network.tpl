{{/* Out: the gang itself, DNS, Pod Identity, HTTPS and the ports of the configured S3 and MLflow; takes {root, api:
whether the API server too}. EFA does not pass through the network that policies see. */}}
{{- define "tuning.network.egress" -}}
{{- $training := .root.Values.training -}}
{{- $api := .root.Values.networkPolicy.apiServerCIDRs -}}
- to:
    - podSelector:
        matchLabels: {{- include "tuning.selector" .root | nindent 10 }}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
- to:
    - ipBlock: {cidr: 169.254.170.23/32}
    - ipBlock: {cidr: "fd00:ec2::23/128"}
  ports:
    - {port: 80, protocol: TCP}
{{- if or .api (not $api) }}
- ports:
    - {port: 443, protocol: TCP}
    {{- if .api }}
    - {port: 6443, protocol: TCP}
    {{- end }}
{{- else }}
- to:
    - ipBlock: {{- include "tuning.network.except" (dict "cidr" "0.0.0.0/0" "mark" "." "except" $api) | nindent 8 }}
    - ipBlock: {{- include "tuning.network.except" (dict "cidr" "::/0" "mark" ":" "except" $api) | nindent 8 }}
  ports:
    - {port: 443, protocol: TCP}
{{- end }}
{{- range compact (list (dig "data" "endpoint_url" "" $training) (dig "tracking" "mlflow_uri" "" $training)) }}
{{- if and (regexMatch "^https?://" .) (ne (include "tuning.network.port" .) "443") }}
- ports:
    - {port: {{ include "tuning.network.port" . }}, protocol: TCP}
{{- end }}
{{- end }}
{{- if .root.Values.networkPolicy.extraEgress }}
{{ toYaml .root.Values.networkPolicy.extraEgress }}
{{- end }}
{{- end }}

{{/* Takes {cidr, mark, except}: those of `except` that have the address family's mark. */}}
{{- define "tuning.network.except" -}}
cidr: {{ .cidr | quote }}
{{- $mark := .mark -}}
{{- $first := true -}}
{{- range .except -}}
{{- if contains $mark . -}}
{{- if $first }}
except:
{{- $first = false -}}
{{- end }}
  - {{ . | quote }}
{{- end -}}
{{- end -}}
{{- end }}

{{/* The port of an http(s) address. */}}
{{- define "tuning.network.port" -}}
{{- $port := regexFind ":[0-9]+$" (regexFind "^https?://[^/?#]*" .) | trimPrefix ":" -}}
{{- if $port -}}{{ $port }}{{- else if hasPrefix "https:" . -}}443{{- else -}}80{{- end -}}
{{- end }}
