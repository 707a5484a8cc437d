{{/* The nodes' configuration, as node-agent reads it: fields that say nothing are left out. */}}
{{- define "understudy.agent.config" -}}
{{- $config := deepCopy .Values.agent.config -}}
{{- if not $config.credentials.keyFile -}}
{{- if eq $config.credentials.provider "key-file" -}}
{{- fail "agent.config.credentials.provider is key-file, and agent.config.credentials.keyFile names no file" -}}
{{- end -}}
{{- $_ := unset $config.credentials "keyFile" -}}
{{- end -}}
{{- toYaml $config -}}
{{- end }}
