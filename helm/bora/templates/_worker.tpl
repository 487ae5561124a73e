{{/* The pod of a worker: dict root, model, leader (whether it holds rank 0), multi (one of several pods) */}}
{{- define "bora.workerPod" -}}
{{- $root := .root -}}
{{- $model := .model -}}
{{- $workers := $model.workers -}}
{{- $gpu := not (has $workers.device (list "cpu" "fake")) -}}
metadata:
  labels: {{- include "bora.selector" $root | nindent 4 }}
    app.kubernetes.io/component: worker
    bora/model: {{ $model.key }}
    {{- with $workers.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    # a changed configuration is a new group; the number of groups is not in it
    checksum/config: {{ include "bora.workerConfig" (dict "root" $root "model" $model) | sha256sum }}
    {{- with $workers.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "bora.podBasics" (dict "root" $root "part" "worker") | nindent 2 }}
  # SIGTERM drains: the group takes nothing new, running sequences finish or move to another group
  terminationGracePeriodSeconds: {{ add $workers.drainSeconds 30 }}
  {{- if $workers.hostNetwork }}
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  {{- end }}
  {{- if ne $model.download.kind "none" }}
  initContainers:
    {{- include "bora.download" (dict "root" $root "model" $model) | nindent 4 }}
  {{- end }}
  containers:
    - name: worker
      image: {{ include "bora.image" (dict "root" $root "of" $root.Values.image.worker) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      command: [/usr/local/bin/bora, worker, --config, /etc/bora/bora.yaml]
      args:
        - --group=$(BORA_GROUP)
        - --advertise={{ include "bora.podAddress" (dict "root" $root "port" $workers.ports.grpc) }}
        - --host=$(POD_IP)
        - --process-index=$(PROCESS_INDEX)
        - --ranks-per-process={{ $workers.ranksPerPod }}
      env:
        - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        {{- if eq $workers.kind "LeaderWorkerSet" }}
        - name: GROUP_INDEX
          valueFrom: {fieldRef: {fieldPath: "metadata.labels['leaderworkerset.sigs.k8s.io/group-index']"}}
        - name: PROCESS_INDEX
          valueFrom: {fieldRef: {fieldPath: "metadata.labels['leaderworkerset.sigs.k8s.io/worker-index']"}}
        - {name: BORA_GROUP, value: {{ $model.fullname }}-$(GROUP_INDEX)}
        # a pod of the old template joins no leader of the new one, whose group has the same name
        - name: BORA_REVISION
          valueFrom: {fieldRef: {fieldPath: "metadata.labels['leaderworkerset.sigs.k8s.io/template-revision-hash']"}}
        {{- else }}
        - {name: PROCESS_INDEX, value: "0"}
        - {name: BORA_GROUP, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        {{- end }}
        # what CUDA compiles and NCCL writes goes to memory that is not the root file system
        {{- range $key, $value := merge (deepCopy $workers.env) (dict "CUDA_CACHE_PATH" "/tmp/cuda") }}
        {{- if kindIs "map" $value }}
        - name: {{ $key }}
          {{- toYaml $value | nindent 10 }}
        {{- else }}
        - {name: {{ $key }}, value: {{ $value | quote }}}
        {{- end }}
        {{- end }}
      ports:
        {{- if .leader }}
        - {name: grpc, containerPort: {{ $workers.ports.grpc }}}
        {{- end }}
        - {name: peers, containerPort: {{ $workers.ports.peers }}}
        - {name: admin, containerPort: {{ $workers.ports.admin }}}
        {{- if ne $root.Values.grpc.tls.source "none" }}
        - {name: health, containerPort: {{ $root.Values.grpc.tls.healthPort }}}
        {{- end }}
      {{- if .leader }}
      # "serving" means: weights are loaded, every rank is there, and steps make progress
      {{- $probed := ternary $workers.ports.grpc $root.Values.grpc.tls.healthPort (eq $root.Values.grpc.tls.source "none") }}
      startupProbe:
        grpc: {port: {{ $probed }}}
        periodSeconds: 5
        timeoutSeconds: 3
        failureThreshold: {{ max 1 (div $workers.startSeconds 5) }}
      readinessProbe:
        grpc: {port: {{ $probed }}}
        periodSeconds: 5
        timeoutSeconds: 3
        failureThreshold: 2
      # A group without progress ends by itself and says which rank it was; the probe only asks for the port, so
      # that a draining group (which is not "serving") is left in peace.
      livenessProbe:
        tcpSocket: {port: {{ $workers.ports.grpc }}}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 6
        # what takes no connection any more drains nothing either: without this its pod, and its group, would be waited for as long as a drain may take
        terminationGracePeriodSeconds: 30
      {{- else }}
      # Ready while the whole group runs. A budget counts ready pods: those of a group that can't become whole hold up no drain.
      readinessProbe:
        httpGet: {path: /ready, port: admin}
        periodSeconds: 5
        timeoutSeconds: 3
        failureThreshold: 2
      {{- end }}
      {{- include "bora.containerSecurity" (dict "root" $root "add" (ternary (list "IPC_LOCK") list $workers.rdma.ipcLock)) | nindent 6 }}
      {{- $devices := dict }}
      {{- if and $gpu $workers.gpuResource }}
      {{- $_ := set $devices $workers.gpuResource (int $workers.ranksPerPod) }}
      {{- end }}
      {{- if $workers.rdma.enabled }}
      {{- $_ := set $devices $workers.rdma.resource (int $workers.rdma.count) }}
      {{- end }}
      resources:
        requests: {{- merge (deepCopy (default dict $workers.resources.requests)) $devices | toYaml | nindent 10 }}
        limits: {{- merge (deepCopy (default dict $workers.resources.limits)) $devices | toYaml | nindent 10 }}
        {{- with $workers.resourceClaims }}
        claims:
          {{- range . }}
          - {name: {{ .name }}}
          {{- end }}
        {{- end }}
      volumeMounts:
        - {name: config, mountPath: /etc/bora/bora.yaml, subPath: bora.yaml, readOnly: true}
        - {name: shm, mountPath: /dev/shm}
        - {name: tmp, mountPath: /tmp}
        {{- include "bora.clusterSecretMount" $root | nindent 8 }}
        {{- include "bora.registryMounts" $root | nindent 8 }}
        {{- include "bora.grpcMounts" $root | nindent 8 }}
        {{- with include "bora.telemetryMounts" $root }}{{ . | nindent 8 }}{{ end }}
        {{- if ne $model.storage.kind "image" }}
        - {name: model-{{ $model.key }}, mountPath: {{ $model.mount }}, readOnly: true}
        {{- end }}
        {{- with $workers.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    {{- with $workers.extraContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    - name: config
      configMap: {name: {{ $model.fullname }}}
    - name: scripts
      configMap: {name: {{ include "bora.fullname" $root }}-scripts}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $workers.sharedMemory }}}
    - name: tmp
      emptyDir: {sizeLimit: 4Gi}
    {{- include "bora.clusterSecretVolume" $root | nindent 4 }}
    {{- include "bora.registryVolumes" $root | nindent 4 }}
    {{- include "bora.grpcVolumes" (dict "root" $root "role" (ternary "worker" "follower" .leader)) | nindent 4 }}
    {{- with include "bora.telemetryVolumes" $root }}{{ . | nindent 4 }}{{ end }}
    {{- if ne $model.storage.kind "image" }}
    {{- include "bora.modelVolume" $model | nindent 4 }}
    {{- end }}
    {{- with include "bora.extraVolumes" (dict "models" (dict $model.key $model) "own" $workers.extraVolumes) }}{{ . | nindent 4 }}{{ end }}
  {{- with $workers.resourceClaims }}
  resourceClaims: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- include "bora.podOptions" $workers | indent 2 }}
{{- end -}}
