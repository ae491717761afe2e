{{- define "vitrail.labels" -}}
app.kubernetes.io/name: vitrail
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "vitrail.pod" -}}
automountServiceAccountToken: false
{{- /* For a Service named vitrail they would set VITRAIL_PORT, to tcp://ADDRESS:PORT. */}}
enableServiceLinks: false
terminationGracePeriodSeconds: {{ add .Values.drainDelaySeconds .Values.drainSeconds 15 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "vitrail.container" -}}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  privileged: false
  capabilities: {drop: [ALL]}
{{- with .Values.secret }}
envFrom:
  - secretRef: {name: {{ . }}}
{{- end }}
{{- end -}}

{{- define "vitrail.spread" -}}
- maxSkew: 1
  topologyKey: kubernetes.io/hostname
  whenUnsatisfiable: ScheduleAnyway
{{- end -}}

{{- define "vitrail.storage.env" -}}
{{ if .Values.offline }}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end }}
{{- if .Values.store.readOnly }}
- {name: VITRAIL_HEADS_FOLDER, value: /tmp/heads}
{{- end }}
{{- end -}}

{{- define "vitrail.storage.mounts" -}}
- {name: store, mountPath: /var/lib/vitrail, readOnly: {{ .Values.store.readOnly }}}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /home/vitrail}
- {name: shm, mountPath: /dev/shm}
{{- if .Values.catalogs }}
- {name: catalogs, mountPath: /etc/vitrail, readOnly: true}
{{- end }}
{{- if .Values.modelImage }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- end -}}

{{- define "vitrail.storage.volumes" -}}
{{ if .Values.store.claim }}
- name: store
  persistentVolumeClaim: {claimName: {{ .Values.store.claim }}, readOnly: {{ .Values.store.readOnly }}}
{{- else }}
- {name: store, emptyDir: {sizeLimit: {{ .Values.store.size }}}}
{{- end }}
- {name: tmp, emptyDir: {sizeLimit: 2Gi}}
- {name: home, emptyDir: {sizeLimit: 1Gi}}
- {name: shm, emptyDir: {medium: Memory, sizeLimit: 1Gi}}
{{- if .Values.catalogs }}
- {name: catalogs, configMap: {name: {{ .Release.Name }}-catalogs}}
{{- end }}
{{- if .Values.modelImage }}
- {name: models, image: {reference: {{ .Values.modelImage }}, pullPolicy: {{ .Values.image.pullPolicy }}}}
{{- end }}
{{- end -}}
