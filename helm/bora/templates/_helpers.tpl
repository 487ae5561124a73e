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

{{/* What every pod of Bora has: dict root, part */}}
{{- define "bora.podBasics" -}}
serviceAccountName: {{ include "bora.serviceAccount" . }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
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
{{- end -}}

{{- define "bora.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: 10001
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* A model with its defaults: dict root, key, given. As YAML, for fromYaml. */}}
{{- define "bora.model" -}}
{{- $values := .root.Values -}}
{{- $model := deepCopy (omit .given "storage" "download" "workers") -}}
{{- range $section := list "storage" "download" "workers" -}}
{{- $given := default dict (get $.given $section) -}}
{{- $_ := set $model $section (mergeOverwrite (deepCopy (get $values $section)) (deepCopy $given)) -}}
{{- end -}}
{{- $_ := set $model "key" .key -}}
{{- $_ := set $model "name" (default .key .given.name) -}}
{{- $_ := set $model "fullname" (printf "%s-%s" (include "bora.fullname" .root) .key) -}}
{{- $volume := printf "%s/%s" (trimSuffix "/" $model.storage.mountPath) .key -}}
{{- if eq $model.storage.kind "image" -}}
{{- $volume = "" -}}
{{- end -}}
{{- $path := default "" .given.path -}}
{{- $_ := set $model "mount" $volume -}}
{{- $_ := set $model "directory" (ternary $path (trimSuffix "/" (printf "%s/%s" $volume $path)) (eq $volume "")) -}}
{{- with .given.tokenizer -}}
{{- $_ := set $model "tokenizerPath" (ternary . (printf "%s/%s" $volume .) (eq $volume "")) -}}
{{- end -}}
{{- $workers := $model.workers -}}
{{- if mod (int $workers.tensorParallelSize) (int $workers.ranksPerPod) -}}
{{- fail (printf "models.%s.workers: tensorParallelSize (%d) must be a multiple of ranksPerPod (%d)" .key (int $workers.tensorParallelSize) (int $workers.ranksPerPod)) -}}
{{- end -}}
{{- $pods := div (int $workers.tensorParallelSize) (int $workers.ranksPerPod) -}}
{{- if and (eq $workers.kind "StatefulSet") (gt (int $pods) 1) -}}
{{- fail (printf "models.%s.workers: a group of %d pods needs kind LeaderWorkerSet" .key (int $pods)) -}}
{{- end -}}
{{- if and (eq $workers.device "fake") (gt (int $pods) 1) -}}
{{- fail (printf "models.%s.workers: a fake group is one process: ranksPerPod must equal tensorParallelSize" .key) -}}
{{- end -}}
{{- if and (eq (int $workers.autoscaling.minReplicas) 0) (eq $workers.autoscaling.kind "hpa") -}}
{{- fail (printf "models.%s.workers.autoscaling: minReplicas 0 needs kind keda" .key) -}}
{{- end -}}
{{- if and $workers.autoscaling.prometheusAuth.modes (not $workers.autoscaling.prometheusAuth.secret) -}}
{{- fail (printf "models.%s.workers.autoscaling.prometheusAuth: modes need the name of a secret" .key) -}}
{{- end -}}
{{- if and (eq $workers.kind "LeaderWorkerSet") (eq (int $workers.leaderWorkerSet.maxUnavailable) 0) (eq (int $workers.leaderWorkerSet.maxSurge) 0) -}}
{{- fail (printf "models.%s.workers.leaderWorkerSet: maxUnavailable and maxSurge can't both be 0: no group could be replaced" .key) -}}
{{- end -}}
{{- $ports := dict "grpc" $workers.ports.grpc "peers" $workers.ports.peers "admin" $workers.ports.admin -}}
{{- if $values.grpc.tls.secret -}}
{{- $_ := set $ports "grpc.tls.healthPort" $values.grpc.tls.healthPort -}}
{{- end -}}
{{- if ne (len (values $ports | uniq)) (len $ports) -}}
{{- fail (printf "models.%s.workers.ports: each port has one use (grpc, peers, admin, and grpc.tls.healthPort with TLS)" .key) -}}
{{- end -}}
{{- if gt (int $workers.autoscaling.minReplicas) (int $workers.autoscaling.maxReplicas) -}}
{{- fail (printf "models.%s.workers.autoscaling: minReplicas is above maxReplicas" .key) -}}
{{- end -}}
{{- if and (ne $model.download.kind "none") (eq $model.storage.kind "image") -}}
{{- fail (printf "models.%s: nothing can be downloaded to storage of kind image" .key) -}}
{{- end -}}
{{- if and (eq $model.storage.kind "existingClaim") (eq $model.storage.existingClaim "") -}}
{{- fail (printf "models.%s.storage.existingClaim: expected the name of a claim" .key) -}}
{{- end -}}
{{- if and (eq $model.download.kind "huggingFace") (eq $model.download.huggingFace.repository "") -}}
{{- fail (printf "models.%s.download.huggingFace.repository: expected one" .key) -}}
{{- end -}}
{{- if and (eq $model.download.kind "objectStore") (eq $model.download.objectStore.source "") -}}
{{- fail (printf "models.%s.download.objectStore.source: expected one" .key) -}}
{{- end -}}
{{- /* a LeaderWorkerSet makes a StatefulSet and a Service of its own name, which a StatefulSet of ours could not replace */ -}}
{{- if and (eq $workers.kind "StatefulSet") (.root.Capabilities.APIVersions.Has "leaderworkerset.x-k8s.io/v1/LeaderWorkerSet") -}}
{{- if lookup "leaderworkerset.x-k8s.io/v1" "LeaderWorkerSet" .root.Release.Namespace $model.fullname -}}
{{- fail (printf "models.%s.workers.kind: its groups are a LeaderWorkerSet, whose own objects bear the names of the StatefulSet; give the model another key, or delete the LeaderWorkerSet %s first" .key $model.fullname) -}}
{{- end -}}
{{- end -}}
{{- $_ := set $model "pods" $pods -}}
{{- toYaml $model -}}
{{- end -}}

{{/* What the schema can't see: models among each other and the routers' numbers. */}}
{{- define "bora.checks" -}}
{{- $root := . -}}
{{- $taken := list "router" "router-admin" "etcd" "etcd-maintenance" "scripts" "test" -}}
{{- range $key, $given := .Values.models -}}
{{- if or (has $key $taken) (hasPrefix "dashboard-" $key) -}}
{{- fail (printf "models.%s: objects of the chart bear this name; choose another key" $key) -}}
{{- end -}}
{{- $kind := (include "bora.model" (dict "root" $root "key" $key "given" $given) | fromYaml).workers.kind -}}
{{- range $other := keys $root.Values.models -}}
{{- if and (eq $kind "LeaderWorkerSet") (regexMatch (printf "^%s-[0-9]+$" $key) $other) -}}
{{- fail (printf "models.%s: a group of models.%s, which is a LeaderWorkerSet, would bear its name; choose another key" $other $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $router := .Values.router -}}
{{- if eq (int $router.ports.http) (int $router.ports.admin) -}}
{{- fail "router.ports: http and admin must differ" -}}
{{- end -}}
{{- if and $router.autoscaling.enabled (gt (int $router.autoscaling.minReplicas) (int $router.autoscaling.maxReplicas)) -}}
{{- fail "router.autoscaling: minReplicas is above maxReplicas" -}}
{{- end -}}
{{- end -}}

{{/* The port of a URL, its scheme's own where it names none. */}}
{{- define "bora.urlPort" -}}
{{- $url := urlParse . -}}
{{- default (ternary "443" "80" (eq $url.scheme "https")) (regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host)) -}}
{{- end -}}

{{/*
How many of an object there are to be, where no autoscaler says it: dict root, of (apiVersion, kind, name), scaled, replicas, least (optional).
A field that Helm set and gives up becomes its default, one group: so with the upgrade that brings an autoscaler the number that there
is stays in the manifest, until the autoscaler has set it once (by the subresource `scale`) and it is its own. A HorizontalPodAutoscaler takes
zero for "leave it alone": a model that KEDA had taken there begins anew with `least`, which is nobody's field (a scale to zero leaves no owner).
*/}}
{{- define "bora.replicas" -}}
{{- if not .scaled -}}
replicas: {{ .replicas }}
{{- else if .root.Capabilities.APIVersions.Has (printf "%s/%s" .of.apiVersion .of.kind) -}}
{{- $live := lookup .of.apiVersion .of.kind .root.Release.Namespace .of.name -}}
{{- $helms := false -}}
{{- $scalers := false -}}
{{- range dig "metadata" "managedFields" list $live -}}
{{- if eq (default "" .subresource) "scale" -}}
{{- $scalers = true -}}
{{- else if hasKey (dig "fieldsV1" "f:spec" dict .) "f:replicas" -}}
{{- $helms = true -}}
{{- end -}}
{{- end -}}
{{- if and .least $live (eq (int (dig "spec" "replicas" 1 $live)) 0) -}}
replicas: {{ .least }}
{{- else if and $helms (not $scalers) -}}
replicas: {{ $live.spec.replicas }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The volume of a model's storage. */}}
{{- define "bora.modelVolume" -}}
{{- $storage := .storage -}}
- name: model-{{ .key }}
  {{- if eq $storage.kind "pvc" }}
  persistentVolumeClaim: {claimName: {{ .fullname }}-model}
  {{- else if eq $storage.kind "existingClaim" }}
  persistentVolumeClaim: {claimName: {{ $storage.existingClaim }}}
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
  securityContext: {{- include "bora.containerSecurity" . | nindent 4 }}
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
    {{- range $source.include }}
    {{- if or (not $.metadataOnly) (not (hasSuffix "safetensors" .)) }}
    - --include={{ . }}
    {{- end }}
    {{- end }}
  env:
    - {name: PYTHONUNBUFFERED, value: "1"}
    {{- if $source.tokenSecret.name }}
    - name: HF_TOKEN
      valueFrom: {secretKeyRef: {name: {{ $source.tokenSecret.name }}, key: {{ $source.tokenSecret.key }}}}
    {{- end }}
  {{- else }}
  {{- $source := $download.objectStore }}
  image: {{ .root.Values.image.registry }}{{ $source.image }}
  args:
    - copy
    - {{ $source.source }}
    - {{ .model.directory }}
    - --checksum
    - --stats=30s
    - --stats-one-line
    - --log-level=NOTICE
    {{- if .metadataOnly }}
    - --exclude=*.safetensors
    {{- end }}
  env:
    - {name: RCLONE_CONFIG, value: /tmp/rclone.conf}
    - {name: RCLONE_CACHE_DIR, value: /tmp}
  {{- with $source.secret }}
  envFrom:
    - secretRef: {name: {{ . }}}
  {{- end }}
  {{- end }}
  volumeMounts:
    - {name: model-{{ .model.key }}, mountPath: {{ .model.mount }}}
    - {name: tmp, mountPath: /tmp}
    {{- if eq $download.kind "huggingFace" }}
    - {name: scripts, mountPath: /scripts, readOnly: true}
    {{- end }}
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
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- if and (eq .Values.etcd.kind "external") .Values.etcd.external.username }}
- name: etcd-password
  secret:
    secretName: {{ required "etcd.external.passwordSecret.name: expected the name of a Secret" .Values.etcd.external.passwordSecret.name }}
    defaultMode: 0440
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

{{/* The `grpc` section of the configuration. */}}
{{- define "bora.grpc" -}}
{{- if .Values.grpc.tls.secret -}}
grpc:
  tls:
    ca_file: /etc/bora/grpc-tls/ca.crt
    certificate_file: /etc/bora/grpc-tls/tls.crt
    key_file: /etc/bora/grpc-tls/tls.key
    server_name: {{ .Values.grpc.tls.serverName | quote }}
{{- end }}
{{- end -}}

{{- define "bora.grpcVolumes" -}}
{{- with .Values.grpc.tls.secret }}
- name: grpc-tls
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end -}}

{{- define "bora.grpcMounts" -}}
{{- if .Values.grpc.tls.secret }}
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
  secret: {secretName: {{ .Values.telemetry.otlpCaSecret }}, defaultMode: 0440}
{{- end }}
{{- end -}}

{{- define "bora.telemetryMounts" -}}
{{- if and .Values.telemetry.otlpEndpoint .Values.telemetry.otlpCaSecret }}
- {name: otlp-tls, mountPath: /etc/bora/otlp-tls, readOnly: true}
{{- end }}
{{- end -}}

{{- /* The `telemetry` section, where a collector is named. */ -}}
{{- define "bora.telemetry" -}}
{{- with .Values.telemetry }}
{{- if .otlpEndpoint -}}
telemetry:
  otlp_endpoint: {{ .otlpEndpoint | quote }}
  {{- if .otlpCaSecret }}
  otlp_ca_file: /etc/bora/otlp-tls/ca.crt
  {{- end }}
  sample_ratio: {{ .sampleRatio }}
  metrics: {{ .metrics }}
{{- end }}
{{- end }}
{{- end }}
