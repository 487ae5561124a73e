{{/* What autoscalers need of several objects. */}}

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
