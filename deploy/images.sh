#!/bin/sh
# Builds the images with buildah, which needs no Docker engine and no daemon.
#
#   deploy/images.sh gateway      vitrail-gateway, without torch
#   deploy/images.sh service      vitrail, the whole service
#
# BASE=debian       makes the base image with debootstrap, where no registry of images can be reached
# TORCH_INDEX_URL   the index that torch is installed from, for a CPU-only build
# EXTRAS            extras of the whole service: postgres, ray, int8, gpu
set -eu
cd "$(dirname "$0")/.."

BASE_IMAGE=docker.io/library/python:3.11-slim
export BUILDAH_ISOLATION="${BUILDAH_ISOLATION:-chroot}"
# In a container, the default driver may not work.
buildah info >/dev/null 2>&1 || export STORAGE_DRIVER=vfs

make_base() {
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$folder"
    rm -rf "$folder"/var/cache/apt/archives/*.deb "$folder"/var/lib/apt/lists/*
    ln -s python3 "$folder/usr/bin/python"
    container=$(buildah from scratch)
    cp -a "$folder/." "$(buildah mount "$container")/"
    buildah commit --rm "$container" "$BASE_IMAGE"
}

# build TAG ARGUMENT...
build() {
    tag=$1
    shift
    # The machine's own certificates, for pip behind a proxy. They are not in the image.
    if [ -n "${SSL_CERT_FILE:-}" ]; then
        set -- --volume "$SSL_CERT_FILE:/etc/ssl/certs/ca-certificates.crt:ro" "$@"
    fi
    # Docker's format has the health check, which OCI's lacks.
    buildah bud --format docker --layers=false --tag "$tag" "$@" .
}

if [ "${BASE:-}" = debian ] && [ -z "$(buildah images --quiet "$BASE_IMAGE" 2>/dev/null)" ]; then
    make_base
fi
case "${1:-}" in
gateway) build vitrail-gateway --target gateway ;;
service) build vitrail --build-arg TORCH_INDEX_URL="${TORCH_INDEX_URL:-}" --build-arg EXTRAS="${EXTRAS:-postgres}" ;;
*) echo "usage: $0 gateway|service" >&2 && exit 2 ;;
esac
