{{/* The models of the values, each with its defaults, and what the schema can't see of them. */}}

{{/* A model with its defaults: dict root, key, given. As YAML, for fromYaml. */}}
{{- define "bora.model" -}}
{{- $values := .root.Values -}}
{{- $model := deepCopy (omit .given "storage" "download" "workers") -}}
{{- range $section := list "storage" "download" "workers" -}}
{{- $given := default dict (get $.given $section) -}}
{{- $merged := mergeOverwrite (deepCopy (get $values $section)) (deepCopy $given) -}}
{{- include "bora.dropNulls" (dict "target" $merged "given" $given) -}}
{{- $_ := set $model $section $merged -}}
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
{{- if ne $values.grpc.tls.source "none" -}}
{{- $_ := set $ports "grpc.tls.healthPort" $values.grpc.tls.healthPort -}}
{{- end -}}
{{- if ne (len (values $ports | uniq)) (len $ports) -}}
{{- fail (printf "models.%s.workers.ports: each port has one use (grpc, peers, admin, and grpc.tls.healthPort with TLS)" .key) -}}
{{- end -}}
{{- if gt (int $workers.autoscaling.minReplicas) (int $workers.autoscaling.maxReplicas) -}}
{{- fail (printf "models.%s.workers.autoscaling: minReplicas is above maxReplicas" .key) -}}
{{- end -}}
{{- if and (has $workers.device (list "cuda" "auto")) (not $workers.gpuResource) (not $workers.resourceClaims) -}}
{{- fail (printf "models.%s.workers.gpuResource: null is for GPUs that workers.resourceClaims ask for, and there are none" .key) -}}
{{- end -}}
{{- if and $model.storage.readOnly (ne $model.storage.kind "existingClaim") -}}
{{- fail (printf "models.%s.storage.readOnly: only for storage of kind existingClaim" .key) -}}
{{- end -}}
{{- if and $model.storage.readOnly (ne $model.download.kind "none") -}}
{{- fail (printf "models.%s: nothing can be downloaded to a read-only claim; set download.kind to none" .key) -}}
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

{{/* What a model's own section sets to null is taken out of its defaults, which a merge keeps: dict target (changed in place), given */}}
{{- define "bora.dropNulls" -}}
{{- range $key, $value := .given -}}
{{- if kindIs "invalid" $value -}}
{{- $_ := unset $.target $key -}}
{{- else if and (kindIs "map" $value) (kindIs "map" (get $.target $key)) -}}
{{- include "bora.dropNulls" (dict "target" (get $.target $key) "given" $value) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* All models by their keys, with their defaults. One that is null is none: so a preset's model is removed on the command line. As YAML, for fromYaml. */}}
{{- define "bora.models" -}}
{{- $models := dict -}}
{{- range $key, $given := .Values.models -}}
{{- if not (kindIs "invalid" $given) -}}
{{- $_ := set $models $key (include "bora.model" (dict "root" $ "key" $key "given" $given) | fromYaml) -}}
{{- end -}}
{{- end -}}
{{- toYaml $models -}}
{{- end -}}

{{/* What the schema can't see: models among each other and the routers' numbers. */}}
{{- define "bora.checks" -}}
{{- $taken := list "router" "router-admin" "etcd" "etcd-maintenance" "scripts" "test" "cluster-secret" -}}
{{- $models := include "bora.models" . | fromYaml -}}
{{- range $key, $model := $models -}}
{{- if or (has $key $taken) (hasPrefix "dashboard-" $key) -}}
{{- fail (printf "models.%s: objects of the chart bear this name; choose another key" $key) -}}
{{- end -}}
{{- range $other := keys $models -}}
{{- if and (eq $model.workers.kind "LeaderWorkerSet") (regexMatch (printf "^%s-[0-9]+$" $key) $other) -}}
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
{{- $service := $router.service -}}
{{- if eq $service.type "ClusterIP" -}}
{{- range $key := list "nodePort" "externalTrafficPolicy" -}}
{{- if get $service $key -}}
{{- fail (printf "router.service.%s: only for type NodePort or LoadBalancer" $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if ne $service.type "LoadBalancer" -}}
{{- range $key := list "loadBalancerClass" "loadBalancerSourceRanges" -}}
{{- if get $service $key -}}
{{- fail (printf "router.service.%s: only for type LoadBalancer" $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
