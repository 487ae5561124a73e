{{/* The storage of a model, and what fills it. */}}

{{/* The volume of a model's storage. */}}
{{- define "bora.modelVolume" -}}
{{- $storage := .storage -}}
{{- $readOnly := ternary ", readOnly: true" "" $storage.readOnly -}}
- name: model-{{ .key }}
  {{- if eq $storage.kind "pvc" }}
  persistentVolumeClaim: {claimName: {{ .fullname }}-model{{ $readOnly }}}
  {{- else if eq $storage.kind "existingClaim" }}
  persistentVolumeClaim: {claimName: {{ $storage.existingClaim }}{{ $readOnly }}}
  {{- else if eq $storage.kind "hostPath" }}
  hostPath: {path: {{ $storage.hostPath }}, type: Directory}
  {{- else }}
  emptyDir: {sizeLimit: {{ $storage.emptyDirSize }}}
  {{- end }}
{{- end -}}

{{/* The init container that fills the storage: dict root, model, metadataOnly (a router needs no weights) */}}
{{- define "bora.download" -}}
{{- $download := .model.download -}}
- name: download-{{ .model.key }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  {{- include "bora.containerSecurity" (dict "root" .root) | nindent 2 }}
  resources: {{- toYaml $download.resources | nindent 4 }}
  {{- if eq $download.kind "huggingFace" }}
  {{- $source := $download.huggingFace }}
  image: {{ include "bora.image" (dict "root" .root "of" .root.Values.image.tools) }}
  command:
    - python3
    - /scripts/fetch_model.py
    - --endpoint={{ $source.endpoint }}
    - --repository={{ $source.repository }}
    - --revision={{ $source.revision }}
    - --to={{ .model.directory }}
    - --timeout={{ $download.timeoutSeconds }}
    {{- range $source.include }}
    {{- if or (not $.metadataOnly) (not (hasSuffix "safetensors" .)) }}
    - --include={{ . }}
    {{- end }}
    {{- end }}
  env:
    - {name: PYTHONUNBUFFERED, value: "1"}
    {{- with $download.env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- if $source.tokenSecret.name }}
    - name: HF_TOKEN
      valueFrom: {secretKeyRef: {name: {{ $source.tokenSecret.name }}, key: {{ $source.tokenSecret.key }}}}
    {{- end }}
  {{- else }}
  {{- $source := $download.objectStore }}
  image: {{ .root.Values.image.registry }}{{ $source.image }}
  command:
    - sh
    - /scripts/fetch_objects.sh
    - {{ $source.source | quote }}
    - {{ .model.directory }}
    - {{ $download.timeoutSeconds | quote }}
    {{- if .metadataOnly }}
    - --exclude=*.safetensors
    {{- end }}
  env:
    - {name: RCLONE_CONFIG, value: /tmp/rclone.conf}
    - {name: RCLONE_CACHE_DIR, value: /tmp}
    {{- with $download.env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $source.secret }}
  envFrom:
    - secretRef: {name: {{ . }}}
  {{- end }}
  {{- end }}
  volumeMounts:
    - {name: model-{{ .model.key }}, mountPath: {{ .model.mount }}}
    - {name: tmp, mountPath: /tmp}
    - {name: scripts, mountPath: /scripts, readOnly: true}
    {{- with $download.extraVolumeMounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* A pod's further volumes, once each: those of its models' downloads, and its own. dict models, own */}}
{{- define "bora.extraVolumes" -}}
{{- $volumes := list -}}
{{- range $key, $model := .models -}}
{{- if ne $model.download.kind "none" -}}
{{- $volumes = concat $volumes (default list $model.download.extraVolumes) -}}
{{- end -}}
{{- end -}}
{{- with concat $volumes (default list .own) | uniq -}}
{{- toYaml . -}}
{{- end -}}
{{- end -}}
