{{/* The texts of bora.yaml, one of the routers and one of each model's workers: what a checksum is of. */}}

{{/* Names under which routers without keys, and their admin ports, are addressed: services, ingress and route. */}}
{{- define "bora.allowedHosts" -}}
{{- $names := list (include "bora.fullname" .) (printf "%s-router-admin" (include "bora.fullname" .)) -}}
{{- range $name := $names }}
- {{ $name | quote }}
- {{ printf "%s.%s" $name $.Release.Namespace | quote }}
- {{ printf "%s.%s.svc" $name $.Release.Namespace | quote }}
- {{ printf "%s.%s.svc.cluster.local" $name $.Release.Namespace | quote }}
{{- end }}
{{- if .Values.ingress.enabled }}
- {{ .Values.ingress.host | quote }}
{{- end }}
{{- if .Values.httpRoute.enabled }}
{{- range .Values.httpRoute.hostnames }}
- {{ . | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The routers' configuration. */}}
{{- define "bora.routerConfig" -}}
{{- $root := . -}}
cluster: {{ include "bora.cluster" . | quote }}
cluster_secret_file: /etc/bora/cluster-secret/{{ .Values.clusterSecret.key }}
registry: {{- include "bora.registry" . | nindent 2 }}
{{- with include "bora.models" . | fromYaml }}
models:
  {{- range $key, $model := . }}
  {{- include "bora.modelEntry" $model | nindent 2 }}
  {{- end }}
{{- end }}
http:
  host: {{ .Values.bindAddress | quote }}
  port: {{ .Values.router.ports.http }}
  admin: {{ include "bora.listen" (dict "root" . "port" .Values.router.ports.admin) | quote }}
  {{- with .Values.router.http }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  allowed_hosts: {{- include "bora.allowedHosts" . | nindent 4 }}
  {{- if .Values.router.tls.secret }}
  tls: {certificate_file: /etc/bora/http-tls/tls.crt, key_file: /etc/bora/http-tls/tls.key}
  {{- end }}
{{- with include "bora.grpc" . }}
{{- . | nindent 0 }}
{{- end }}
router:
  {{- $options := dict "shutdown_grace_seconds" .Values.router.drain.graceSeconds }}
  {{- if .Values.router.keys.secret }}
  {{- $_ := set $options "access" (dict "keys" (printf "/etc/bora/keys/%s" .Values.router.keys.key)) }}
  {{- end }}
  {{- mergeOverwrite $options (deepCopy (default dict .Values.router.options)) | toYaml | nindent 2 }}
log:
  level: {{ .Values.log.level | quote }}
  format: {{ .Values.log.format }}
{{- include "bora.telemetry" . | nindent 0 }}
{{- end -}}

{{/* A worker's configuration: dict root, model */}}
{{- define "bora.workerConfig" -}}
{{- $root := .root -}}
{{- $model := .model -}}
{{- $workers := $model.workers -}}
cluster: {{ include "bora.cluster" $root | quote }}
cluster_secret_file: /etc/bora/cluster-secret/{{ $root.Values.clusterSecret.key }}
registry: {{- include "bora.registry" $root | nindent 2 }}
models:
  {{- include "bora.modelEntry" $model | nindent 2 }}
{{- with include "bora.grpc" $root }}
{{- . | nindent 0 }}
{{- end }}
worker:
  {{- if ne $root.Values.grpc.tls.source "none" }}
  health: {{ include "bora.listen" (dict "root" $root "port" $root.Values.grpc.tls.healthPort) | quote }}
  {{- end }}
  device: {{ $workers.device }}
  tensor_parallel_size: {{ $workers.tensorParallelSize }}
  listen: {{ include "bora.listen" (dict "root" $root "port" $workers.ports.grpc) | quote }}
  peers: {{ include "bora.listen" (dict "root" $root "port" $workers.ports.peers) | quote }}
  admin: {{ include "bora.listen" (dict "root" $root "port" $workers.ports.admin) | quote }}
  rendezvous_seconds: {{ $workers.rendezvousSeconds }}
  heartbeat_seconds: {{ $workers.heartbeatSeconds }}
  collective_seconds: {{ $workers.collectiveSeconds }}
  drain_seconds: {{ $workers.drainSeconds }}
  {{- with $workers.maxModelLen }}
  max_model_len: {{ int64 . }}
  {{- end }}
  load_format: {{ $workers.loadFormat }}
  {{- if $workers.disableCustomAllReduce }}
  disable_custom_all_reduce: true
  {{- end }}
  kv_cache:
    {{- with $workers.kvCache.blocks }}
    blocks: {{ int64 . }}
    {{- end }}
    {{- with $workers.kvCache.memory }}
    memory: {{ . }}
    {{- end }}
    {{- with $workers.kvCache.deviceShare }}
    device_share: {{ . }}
    {{- end }}
    {{- with $workers.kvCache.hostMemory }}
    host_memory: {{ . }}
    {{- end }}
    dtype: {{ $workers.kvCache.dtype }}
  {{- with $workers.schedule }}
  schedule: {{- toYaml . | nindent 4 }}
  {{- end }}
log:
  level: {{ $root.Values.log.level | quote }}
  format: {{ $root.Values.log.format }}
{{- include "bora.telemetry" $root | nindent 0 }}
{{- end -}}
