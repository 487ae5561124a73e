{{/* What pods of several parts share: identity, security, placement. */}}

{{/* What every pod of Bora has: dict root, part, account (of another name than the part's), token (whether it is mounted) */}}
{{- define "bora.podBasics" -}}
serviceAccountName: {{ default (include "bora.serviceAccount" .) .account }}
automountServiceAccountToken: {{ default false .token }}
enableServiceLinks: false
{{- with .root.Values.podSecurityContext }}
securityContext: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* The securityContext of a container, with its key, or nothing: dict root, add (capabilities, optional) */}}
{{- define "bora.containerSecurity" -}}
{{- $context := deepCopy (default dict .root.Values.containerSecurityContext) -}}
{{- with .add -}}
{{- $capabilities := default dict $context.capabilities -}}
{{- $_ := set $capabilities "add" (concat (default list $capabilities.add) . | uniq) -}}
{{- $_ := set $context "capabilities" $capabilities -}}
{{- end -}}
{{- with $context -}}
securityContext: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/*
Mode of the files of a Secret. A pod's group may read them if the pod has one (`fsGroup`); without one they belong to root, and the
process runs as whom the image or the cluster says. Only this pod mounts the volume.
*/}}
{{- define "bora.secretMode" -}}
{{- ternary "0440" "0444" (empty (default dict .Values.podSecurityContext).fsGroup | not) -}}
{{- end -}}

{{/* Where a part's smaller pods run: where the part does. A section of the values. */}}
{{- define "bora.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .schedulerName }}
schedulerName: {{ . }}
{{- end }}
{{- end -}}

{{/* Further fields of a part's pods. A section of the values. */}}
{{- define "bora.podOptions" -}}
{{- include "bora.placement" . }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .hostAliases }}
hostAliases: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .dnsConfig }}
dnsConfig: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
