{{- define "qvl.labels" -}}
app.kubernetes.io/name: qvl
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "qvl.meta" -}}
name: {{ .root.Release.Name }}-{{ .part }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "qvl.labels" . | nindent 2 }}
  app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
  app.kubernetes.io/managed-by: {{ .root.Release.Service }}
  helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{- /* Pods of the profile "restricted"; with root, of "baseline". */ -}}
{{- define "qvl.podSecurity" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  seccompProfile: {type: RuntimeDefault}
  {{- if not .root }}
  runAsNonRoot: true
  runAsUser: {{ .user | default 10001 }}
  runAsGroup: {{ .user | default 10001 }}
  fsGroup: {{ .user | default 10001 }}
  fsGroupChangePolicy: OnRootMismatch
  {{- end }}
{{- end }}

{{- define "qvl.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  {{- if not .root }}
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
  {{- end }}
{{- end }}

{{- define "qvl.key" -}}
valueFrom:
  secretKeyRef: {name: {{ . | quote }}, key: api-key}
{{- end }}

{{- /* /ready answers nobody without the key, which an httpGet probe cannot send. */ -}}
{{- define "qvl.askReady" -}}
exec:
  command:
    - python3
    - -c
    - >-
      import os, urllib.request as r;
      r.urlopen(r.Request('http://127.0.0.1:8000{{ .path }}',
      headers={'Authorization': 'Bearer ' + os.environ['{{ .key }}']}), timeout=4)
periodSeconds: 10
timeoutSeconds: 5
{{- end }}

{{- define "qvl.engineKey" -}}
{{ if eq .Values.engine.kind "vllm" }}VLLM_API_KEY{{ else }}QVL_API_KEY{{ end }}
{{- end }}

{{- define "qvl.model" -}}
{{- if .Values.weights.enabled -}}
{{- if contains "/" .Values.engine.model -}}
{{- fail (printf "engine.model is %s; with weights.enabled it is the name of a folder on the volume" .Values.engine.model) -}}
{{- end -}}
/models/{{ required "engine.model is needed with weights.enabled: the model's folder on the volume" .Values.engine.model }}
{{- else -}}
{{ .Values.engine.model }}
{{- end -}}
{{- end }}

{{- define "qvl.claim" -}}
{{ .Values.weights.claim | default (printf "%s-weights" .Release.Name) }}
{{- end }}

{{- /* An engine takes minutes to start: it is given up slowly. */ -}}
{{- define "qvl.scaleDown" -}}
scaleDown:
  stabilizationWindowSeconds: 900
  policies:
    - {type: Pods, value: 1, periodSeconds: 300}
{{- end }}

{{- /* What a download job was told. A job cannot be changed: other settings are another job, and another mark. */ -}}
{{- define "qvl.settings" -}}
{{ list .Values.weights.download .Values.pool.image .Values.engine.model | toJson | sha256sum | trunc 8 }}
{{- end }}

{{- define "qvl.mark" -}}
.complete-{{ include "qvl.settings" . }}
{{- end }}
