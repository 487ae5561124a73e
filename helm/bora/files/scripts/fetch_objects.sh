#!/bin/sh
# Copies a checkpoint from object storage with rclone, as fetch_model.py does it from a hub: within a time, and with the set that was copied
# before if the storage is away. A manifest beside the files lists that set.
#   fetch_objects.sh SOURCE DIRECTORY SECONDS [RCLONE OPTIONS]
set -u
source=$1 directory=$2 seconds=$3
shift 3
end=$(($(date +%s) + seconds))
manifest=$directory/.bora-objects-$(printf '%s\n' "$source" "$@" | sha256sum | cut -c 1-16)
umask 002

# every file of the manifest is there with its size
is_whole() {
  [ -s "$manifest" ] || return 1
  while IFS=';' read -r size path; do
    [ "$(stat -c %s "$directory/$path" 2>/dev/null)" = "$size" ] || return 1
  done <"$manifest"
}

# starts with what is there, or fails
give_up() {
  if is_whole; then
    echo "$1: starting with the files that were copied before" >&2
    exit 0
  fi
  echo "$1" >&2
  exit 1
}

limits="--contimeout=10s --timeout=60s --retries=3 --low-level-retries=5"
asking=$seconds
if is_whole && [ "$asking" -gt 20 ]; then asking=20; fi
# shellcheck disable=SC2086
listed=$(timeout "$asking" rclone lsf --recursive --files-only --format=sp $limits "$@" "$source") || give_up "$source can't be listed"
listed=$(printf '%s\n' "$listed" | sort)
[ -n "$listed" ] || give_up "$source has no files"
if [ "$listed" != "$(cat "$manifest" 2>/dev/null)" ]; then
  # the old set is whole no longer once its first file is replaced
  rm -f "$manifest" || give_up "$directory can't be written"
fi
# shellcheck disable=SC2086
timeout "$((end - $(date +%s)))" rclone copy "$source" "$directory" --checksum --stats=30s --stats-one-line --log-level=NOTICE $limits "$@" ||
  give_up "$source could not be copied within $seconds s"
printf '%s\n' "$listed" >"$manifest.partial" && mv "$manifest.partial" "$manifest"
echo "$(printf '%s\n' "$listed" | wc -l) files are in $directory"
