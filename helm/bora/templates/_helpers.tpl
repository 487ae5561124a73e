{{/* Names, labels, and the parts that several pods share. */}}

{{/*
At most 28 characters: a StatefulSet's pods bear its name and a hash of ten in a label of 63, a LeaderWorkerSet's own
StatefulSets the group's number besides, and a model's key has up to 20. A longer name ends in a hash of the whole, so
that two releases do not share one. A Service's name has no dots and begins with a letter.
*/}}
{{- define "bora.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := default (ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name)) .Values.fullnameOverride | replace "." "-" -}}
{{- if gt (len $full) 28 -}}
{{- $full = printf "%s-%s" ($full | trunc 21 | trimSuffix "-") (sha256sum $full | trunc 6) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]" $full) -}}
{{- fail (printf "fullnameOverride: the names of Services begin with a letter, and `%s` does not" $full) -}}
{{- end -}}
{{- $full -}}
{{- end -}}

{{/* An etcd of one's own may serve releases of one name in several namespaces. */}}
{{- define "bora.cluster" -}}
{{- $full := include "bora.fullname" . -}}
{{- default (ternary $full (printf "%s.%s" .Release.Namespace $full) (eq .Values.etcd.kind "builtin")) .Values.cluster -}}
{{- end -}}

{{/* Labels that select; `component` and, for workers, `model` are added by who calls. */}}
{{- define "bora.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "bora.labels" -}}
{{ include "bora.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* dict root, of (an entry of .Values.image) */}}
{{- define "bora.image" -}}
{{- $tag := default .root.Chart.AppVersion .of.tag -}}
{{- $version := ternary (printf "@%s" .of.digest) (printf ":%s" $tag) (ne .of.digest "") -}}
{{- printf "%s%s%s" .root.Values.image.registry .of.repository $version -}}
{{- end -}}

{{- define "bora.serviceAccount" -}}
{{- ternary (printf "%s-%s" (include "bora.fullname" .root) .part) (default "default" .root.Values.serviceAccount.name) .root.Values.serviceAccount.create -}}
{{- end -}}

{{/* The port of a URL, its scheme's own where it names none. */}}
{{- define "bora.urlPort" -}}
{{- $url := urlParse . -}}
{{- default (ternary "443" "80" (eq $url.scheme "https")) (regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host)) -}}
{{- end -}}

{{/* The `registry` section of the configuration. */}}
{{- define "bora.registry" -}}
{{- $etcd := .Values.etcd -}}
kind: etcd
lease_seconds: {{ $etcd.leaseSeconds }}
{{- if eq $etcd.kind "external" }}
{{- if not $etcd.external.endpoints }}
{{- fail "etcd.external.endpoints: expected at least one host:port" }}
{{- end }}
endpoints: {{- toYaml $etcd.external.endpoints | nindent 2 }}
{{- if $etcd.external.username }}
username: {{ $etcd.external.username | quote }}
password_file: /etc/bora/etcd-password/{{ $etcd.external.passwordSecret.key }}
{{- end }}
{{- if $etcd.external.tls.enabled }}
tls:
  ca_file: /etc/bora/etcd-tls/ca.crt
  {{- if $etcd.external.tls.clientCertificate }}
  certificate_file: /etc/bora/etcd-tls/tls.crt
  key_file: /etc/bora/etcd-tls/tls.key
  {{- end }}
{{- end }}
{{- else }}
endpoints:
  {{- range $index := until (int $etcd.builtin.replicas) }}
  - {{ include "bora.etcdMember" (dict "root" $ "index" $index) }}:2379
  {{- end }}
{{- if $etcd.builtin.tls.enabled }}
tls:
  ca_file: /etc/bora/etcd-tls/ca.crt
  certificate_file: /etc/bora/etcd-tls/tls.crt
  key_file: /etc/bora/etcd-tls/tls.key
{{- end }}
{{- end }}
{{- end -}}

{{/* Host name of a member: dict root, index */}}
{{- define "bora.etcdMember" -}}
{{- $name := printf "%s-etcd" (include "bora.fullname" .root) -}}
{{- printf "%s-%v.%s.%s.svc.%s" $name .index $name .root.Release.Namespace .root.Values.clusterDomain -}}
{{- end -}}

{{/* Name of the Secret with which Bora shows itself to etcd, or nothing. */}}
{{- define "bora.etcdClientSecret" -}}
{{- $etcd := .Values.etcd -}}
{{- if eq $etcd.kind "external" -}}
{{- if $etcd.external.tls.enabled -}}
{{- required "etcd.external.tls.secret: expected the name of a Secret" $etcd.external.tls.secret -}}
{{- end -}}
{{- else if $etcd.builtin.tls.enabled -}}
{{- ternary $etcd.builtin.tls.existingSecret (printf "%s-etcd-client" (include "bora.fullname" .)) (eq $etcd.builtin.tls.source "existing") -}}
{{- end -}}
{{- end -}}

{{- define "bora.etcdServerSecret" -}}
{{- $tls := .Values.etcd.builtin.tls -}}
{{- if eq $tls.source "existing" -}}
{{- required "etcd.builtin.tls.existingSecret: expected the name of a Secret" $tls.existingSecret -}}
{{- else -}}
{{- printf "%s-etcd-server" (include "bora.fullname" .) -}}
{{- end -}}
{{- end -}}

{{- define "bora.registryVolumes" -}}
{{- with include "bora.etcdClientSecret" . }}
- name: etcd-tls
  secret: {secretName: {{ . }}, defaultMode: {{ include "bora.secretMode" $ }}}
{{- end }}
{{- if and (eq .Values.etcd.kind "external") .Values.etcd.external.username }}
- name: etcd-password
  secret:
    secretName: {{ required "etcd.external.passwordSecret.name: expected the name of a Secret" .Values.etcd.external.passwordSecret.name }}
    defaultMode: {{ include "bora.secretMode" . }}
{{- end }}
{{- end -}}

{{- define "bora.registryMounts" -}}
{{- if include "bora.etcdClientSecret" . }}
- {name: etcd-tls, mountPath: /etc/bora/etcd-tls, readOnly: true}
{{- end }}
{{- if and (eq .Values.etcd.kind "external") .Values.etcd.external.username }}
- {name: etcd-password, mountPath: /etc/bora/etcd-password, readOnly: true}
{{- end }}
{{- end -}}

{{/* Name of the Secret that holds the cluster secret. */}}
{{- define "bora.clusterSecret" -}}
{{- default (printf "%s-cluster-secret" (include "bora.fullname" .)) .Values.clusterSecret.existing -}}
{{- end -}}

{{- define "bora.clusterSecretVolume" -}}
- name: cluster-secret
  secret: {secretName: {{ include "bora.clusterSecret" . }}, defaultMode: {{ include "bora.secretMode" . }}}
{{- end -}}

{{- define "bora.clusterSecretMount" -}}
- {name: cluster-secret, mountPath: /etc/bora/cluster-secret, readOnly: true}
{{- end -}}

{{/* The `grpc` section of the configuration. */}}
{{- define "bora.grpc" -}}
grpc:
  {{- if eq .Values.grpc.tls.source "none" }}
  # whoever reaches a worker's ports may use and drain it
  insecure: true
  {{- else }}
  tls:
    ca_file: /etc/bora/grpc-tls/ca.crt
    certificate_file: /etc/bora/grpc-tls/tls.crt
    key_file: /etc/bora/grpc-tls/tls.key
  {{- end }}
{{- end -}}

{{/* Name of the Secret with the certificate of a role: dict root, role */}}
{{- define "bora.grpcSecret" -}}
{{- $tls := .root.Values.grpc.tls -}}
{{- if eq $tls.source "existing" -}}
{{- $own := get $tls.existing .role -}}
{{- $own = default (ternary $tls.existing.worker "" (eq .role "follower")) $own -}}
{{- required (printf "grpc.tls.existing.%s: expected the name of a Secret" .role) $own -}}
{{- else -}}
{{- printf "%s-grpc-%s" (include "bora.fullname" .root) .role -}}
{{- end -}}
{{- end -}}

{{/* dict root, role */}}
{{- define "bora.grpcVolumes" -}}
{{- if ne .root.Values.grpc.tls.source "none" }}
- name: grpc-tls
  secret: {secretName: {{ include "bora.grpcSecret" . }}, defaultMode: {{ include "bora.secretMode" .root }}}
{{- end }}
{{- end -}}

{{- define "bora.grpcMounts" -}}
{{- if ne .Values.grpc.tls.source "none" }}
- {name: grpc-tls, mountPath: /etc/bora/grpc-tls, readOnly: true}
{{- end }}
{{- end -}}

{{/* An entry of `models` in the configuration. */}}
{{- define "bora.modelEntry" -}}
- name: {{ .name | quote }}
  {{- with .aliases }}
  aliases: {{- toYaml . | nindent 4 }}
  {{- end }}
  path: {{ .directory | quote }}
  {{- with .tokenizerPath }}
  tokenizer: {{ . | quote }}
  {{- end }}
  {{- if .skipTokenizerInit }}
  skip_tokenizer_init: true
  {{- end }}
{{- end -}}

{{/* host:port to listen on: dict root, port */}}
{{- define "bora.listen" -}}
{{- $host := .root.Values.bindAddress -}}
{{- printf "%s:%d" (ternary (printf "[%s]" $host) $host (contains ":" $host)) (int .port) -}}
{{- end -}}

{{/* The pod's own address and a port, as others reach it: dict root, port */}}
{{- define "bora.podAddress" -}}
{{- printf "%s:%d" (ternary "[$(POD_IP)]" "$(POD_IP)" (contains ":" .root.Values.bindAddress)) (int .port) -}}
{{- end -}}

{{/* The authority of an https collector. */}}
{{- define "bora.telemetryVolumes" -}}
{{- if and .Values.telemetry.otlpEndpoint .Values.telemetry.otlpCaSecret }}
- name: otlp-tls
  secret: {secretName: {{ .Values.telemetry.otlpCaSecret }}, defaultMode: {{ include "bora.secretMode" . }}}
{{- end }}
{{- end -}}

{{- define "bora.telemetryMounts" -}}
{{- if and .Values.telemetry.otlpEndpoint .Values.telemetry.otlpCaSecret }}
- {name: otlp-tls, mountPath: /etc/bora/otlp-tls, readOnly: true}
{{- end }}
{{- end -}}

{{- /* The `telemetry` section, if it differs from the defaults. */ -}}
{{- define "bora.telemetry" -}}
{{- with .Values.telemetry }}
{{- if or .otlpEndpoint (not .vllmNames) -}}
telemetry:
  vllm_names: {{ .vllmNames }}
  {{- if .otlpEndpoint }}
  otlp_endpoint: {{ .otlpEndpoint | quote }}
  {{- if .otlpCaSecret }}
  otlp_ca_file: /etc/bora/otlp-tls/ca.crt
  {{- end }}
  sample_ratio: {{ .sampleRatio }}
  metrics: {{ .metrics }}
  {{- end }}
{{- end }}
{{- end }}
{{- end }}
