{{/* What autoscalers need of several objects. */}}

{{/*
`replicas` of an object: dict root, of (apiVersion, kind, name), scaled (whether an autoscaler sets it), replicas, least (its minReplicas), zero (whether the
autoscaler leaves zero alone, as a HorizontalPodAutoscaler does).

A manifest that has no `replicas` leaves an autoscaler's number alone. But a field that Helm set and gives up becomes its default, which is 1. So:
- a new object begins with `least`, if that is not 1 anyhow;
- an object whose number is Helm's keeps that number in the manifest until the autoscaler has set it (by the subresource `scale`). If Helm merges on the
  client's side (Helm 3), a number that is in the manifest stays there for good: the merge would delete it, whoever set it;
- a model that KEDA took to zero begins anew with `least` under an autoscaler that knows no zero. (A scale to zero leaves no owner.)
A rollback renders nothing: templates/rollback.yaml is for that. `helm template` does not see the cluster, and names no number.
*/}}
{{- define "bora.replicas" -}}
{{- if not .scaled -}}
replicas: {{ .replicas }}
{{- else if .root.Capabilities.APIVersions.Has (printf "%s/%s" .of.apiVersion .of.kind) -}}
{{- $live := lookup .of.apiVersion .of.kind .root.Release.Namespace .of.name -}}
{{- if $live -}}
{{- $helms := false -}}
{{- $scalers := false -}}
{{- $clients := false -}}
{{- range dig "metadata" "managedFields" list $live -}}
{{- if hasKey (dig "fieldsV1" "f:spec" dict .) "f:replicas" -}}
{{- if or (eq (default "" .subresource) "scale") (eq .manager "bora-rollback") -}}
{{- $scalers = true -}}
{{- else -}}
{{- $helms = true -}}
{{- end -}}
{{- end -}}
{{- if and (eq .operation "Update") (hasKey (dig "fieldsV1" "f:metadata" "f:labels" dict .) "f:helm.sh/chart") -}}
{{- $clients = ne (dig "metadata" "annotations" "bora/replicas" "" $live) "autoscaler" -}}
{{- end -}}
{{- end -}}
{{- if and .zero (eq (int (dig "spec" "replicas" 1 $live)) 0) -}}
replicas: {{ .least }}
{{- else if or $clients (and $helms (not $scalers)) -}}
replicas: {{ dig "spec" "replicas" 1 $live }}
{{- end -}}
{{- else if and (gt (int .least) 1) (hasKey (lookup .of.apiVersion .of.kind .root.Release.Namespace "") "items") -}}
replicas: {{ .least }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* `replicas` of a model's groups: dict root, model */}}
{{- define "bora.workerReplicas" -}}
{{- $workers := .model.workers -}}
{{- $of := dict "apiVersion" (ternary "leaderworkerset.x-k8s.io/v1" "apps/v1" (eq $workers.kind "LeaderWorkerSet")) "kind" $workers.kind "name" .model.fullname -}}
{{- $kind := $workers.autoscaling.kind -}}
{{- include "bora.replicas" (dict "root" .root "of" $of "scaled" (ne $kind "none") "replicas" $workers.replicas "least" $workers.autoscaling.minReplicas "zero" (eq $kind "hpa")) -}}
{{- end -}}

{{/* `replicas` of the routers. */}}
{{- define "bora.routerReplicas" -}}
{{- $router := .Values.router -}}
{{- $of := dict "apiVersion" "apps/v1" "kind" "Deployment" "name" (printf "%s-router" (include "bora.fullname" .)) -}}
{{- include "bora.replicas" (dict "root" . "of" $of "scaled" $router.autoscaling.enabled "replicas" $router.replicas "least" $router.autoscaling.minReplicas "zero" false) -}}
{{- end -}}

{{/* The labels of this release's series: what the chart's monitors add. */}}
{{- define "bora.releaseSelector" -}}
{{- printf "namespace=%q,release=%q" .Release.Namespace .Release.Name -}}
{{- end -}}

{{/*
A PromQL expression of files/rules with every metric restricted to this release: another release's rules are its own. dict root, expr.
First the metrics that have a selector, then those that have none. (A metric's name is followed by neither a colon nor a word character.)
*/}}
{{- define "bora.ofRelease" -}}
{{- $selector := include "bora.releaseSelector" .root -}}
{{- $metric := "\\b((?:bora|etcd|process)_[a-z0-9_]+|bora:[a-z0-9_:]+)" -}}
{{- $selected := regexReplaceAll (printf "%s\\{" $metric) .expr (printf "${1}{%s," $selector) -}}
{{- regexReplaceAll (printf "%s([^a-z0-9_:{]|$)" $metric) $selected (printf "${1}{%s}${2}" $selector) -}}
{{- end -}}
