{{/* Namespace that all objects of a workload live in; the release itself may be recorded in another one. */}}
{{- define "mint.namespace" -}}
{{ .Values.namespace.name }}
{{- end -}}

{{/* Labels of every object. */}}
{{- define "mint.labels" -}}
app.kubernetes.io/name: mint
app.kubernetes.io/part-of: mint
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* Selects pods of ours by their component. Takes a list of components. */}}
{{- define "mint.podsOf" -}}
matchLabels:
  app.kubernetes.io/part-of: mint
matchExpressions:
  - key: app.kubernetes.io/component
    operator: In
    values: {{ toJson . }}
{{- end -}}

{{/* An image by its digest. Takes a list: the values, `serve` or `train`. */}}
{{- define "mint.image" -}}
{{- $image := get (index . 0).images (index . 1) -}}
{{- if not $image -}}
{{- fail (printf "images.%s is empty: set it to the image that you built, with its digest (--set images.%s=REGISTRY/mint-%s@sha256:...). `docker images --digests` prints digests of pushed images." (index . 1) (index . 1) (index . 1)) -}}
{{- end -}}
{{ $image }}
{{- end -}}

{{/* Name of the secret with the store's keys; empty where the service account stands for itself. */}}
{{- define "mint.s3Secret" -}}
{{- if ne .Values.s3.credentials "workloadIdentity" }}{{ .Values.s3.secretName }}{{ end -}}
{{- end -}}

{{/* Name of the secret with the hub's token; empty where there is none. */}}
{{- define "mint.hubSecret" -}}
{{- if and .Values.hub.isAllowed (ne .Values.hub.credentials "none") }}{{ .Values.hub.secretName }}{{ end -}}
{{- end -}}

{{/* Name of the secret with the key of recipes that de-identify; empty where there is none. */}}
{{- define "mint.deidentificationSecret" -}}
{{- if ne .Values.deidentification.credentials "none" }}{{ .Values.deidentification.secretName }}{{ end -}}
{{- end -}}

{{/* Name of the secret with the keys of chat models; empty where there is none. */}}
{{- define "mint.chatSecret" -}}
{{- if and .Values.chat.isAllowed (ne .Values.chat.credentials "none") }}{{ .Values.chat.secretName }}{{ end -}}
{{- end -}}

{{/* Address of the store as pods reach it. */}}
{{- define "mint.s3Endpoint" -}}
{{- $url := .Values.s3.endpointUrl -}}
{{- if not $url -}}
{{- fail "s3.endpointUrl is empty: set it to the address of the store as pods reach it, for instance https://s3.eu-central-1.amazonaws.com." -}}
{{- end -}}
{{- if regexMatch "^https?://(localhost|127\\.[0-9.]+|\\[::1\\])(:|/|$)" $url -}}
{{- fail (printf "s3.endpointUrl %s is on the loopback of a machine, which no pod reaches: give the address that the cluster uses." $url) -}}
{{- end -}}
{{ trimSuffix "/" $url }}
{{- end -}}

{{/* Environment of a pod of ours, without its number of threads. */}}
{{- define "mint.environment" -}}
- name: MINT_S3_ENDPOINT_URL
  value: {{ include "mint.s3Endpoint" . | quote }}
- name: MINT_S3_BUCKET
  value: {{ .Values.s3.bucket | quote }}
{{- with .Values.s3.prefix }}
- name: MINT_S3_PREFIX
  value: {{ trimAll "/" . | quote }}
{{- end }}
- name: MINT_S3_REGION
  value: {{ .Values.s3.region | quote }}
- name: MINT_S3_PATH_STYLE
  value: {{ .Values.s3.pathStyle | quote }}
{{- if .Values.s3.caConfigMap }}
- name: MINT_S3_CA_BUNDLE
  value: /etc/mint/ca/ca.crt
{{- end }}
- name: MINT_CACHE_DIR
  value: /var/cache/mint
- name: HF_HOME
  value: /var/cache/mint/hub
- name: HOME
  value: /tmp
{{- $secret := include "mint.s3Secret" . }}
{{- if $secret }}
{{- range tuple "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ . }}
  valueFrom: {secretKeyRef: {name: {{ $secret }}, key: {{ . }}}}
{{- end }}
{{- end }}
{{- with include "mint.hubSecret" . }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ . }}, key: HF_TOKEN}}
{{- end }}
{{- end -}}

{{/* A pod's securityContext; without numbers where the platform gives each namespace its own. */}}
{{- define "mint.podSecurity" -}}
runAsNonRoot: true
{{- with .Values.userId }}
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
{{- end }}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* A container's securityContext. */}}
{{- define "mint.containerSecurity" -}}
allowPrivilegeEscalation: false
runAsNonRoot: true
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* Names of secrets that open the registry, as a pod lists them. */}}
{{- define "mint.pullSecrets" -}}
{{- range .Values.images.pullSecrets }}
- name: {{ . }}
{{- end }}
{{- end -}}

{{/* What a server's container may use; requests equal limits. Takes a model's resources. */}}
{{- define "mint.serverResources" -}}
{{- $amounts := dict "cpu" (toString .numCpus) "memory" (printf "%dGi" (int .memoryGib)) "ephemeral-storage" (printf "%dGi" (add (int .scratchGib) (int .cacheGib) 1)) -}}
requests: {{ toJson $amounts }}
limits: {{ toJson $amounts }}
{{- end -}}

{{/*
A CIDR as a network policy's peer. The cloud's metadata service (169.254.0.0/16) gives a node's credentials to whoever
asks: a block around it leaves it out, a block inside it is refused.
*/}}
{{- define "mint.ipPeer" -}}
{{- $cidr := index . 0 -}}
{{- $except := index . 1 -}}
{{- $parts := splitList "/" $cidr -}}
{{- if contains ":" $cidr -}}
{{- if regexMatch "^(fe[89ab]|fd00:0?ec2:)" (lower $cidr) -}}
{{- fail (printf "network: %s is where clouds keep their metadata service; pods must not reach it." $cidr) -}}
{{- end -}}
{{- if eq $cidr "::/0" -}}{{- $except = concat $except (list "fd00:ec2::/32" "fe80::/10") -}}{{- end -}}
{{- else -}}
{{- $ip := 0 -}}
{{- range splitList "." (index $parts 0) -}}{{- $ip = add (mul $ip 256) (int .) -}}{{- end -}}
{{- $length := int (index $parts 1) -}}
{{- $size := 1 -}}
{{- range until (int (sub 32 $length)) -}}{{- $size = mul $size 2 -}}{{- end -}}
{{- $linkLocal := 2851995648 -}}
{{- if gt $length 16 -}}
{{- if eq (div $ip 65536) (div $linkLocal 65536) -}}
{{- fail (printf "network: %s is where clouds keep their metadata service; pods must not reach it. For EKS Pod Identity set network.podIdentity." $cidr) -}}
{{- end -}}
{{- else if eq (div $ip $size) (div $linkLocal $size) -}}
{{- if eq $length 16 -}}{{- fail (printf "network: %s is where clouds keep their metadata service; pods must not reach it." $cidr) -}}{{- end -}}
{{- $except = append $except "169.254.0.0/16" -}}
{{- end -}}
{{- end -}}
- ipBlock:
    cidr: {{ $cidr }}
    {{- with $except }}
    except: {{ toJson . }}
    {{- end }}
{{- end -}}

{{/* Pods of another namespace as a network policy's peer. Takes a namespace and pod labels. */}}
{{- define "mint.podPeer" -}}
- namespaceSelector:
    matchLabels:
      kubernetes.io/metadata.name: {{ index . 0 }}
  {{- with index . 1 }}
  podSelector:
    matchLabels: {{ toJson . }}
  {{- end }}
{{- end -}}

{{/* Ports of a network policy's rule. Takes a list of TCP ports. */}}
{{- define "mint.tcpPorts" -}}
{{- range . }}
- {protocol: TCP, port: {{ int . }}}
{{- end }}
{{- end -}}
