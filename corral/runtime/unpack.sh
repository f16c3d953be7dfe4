# shellcheck shell=sh
# Unpack an archive beside the files, then move each into place: a full disk leaves the old ones as they were. Every file
# belongs to the ssh user, and only that user may enter the folder. Containers read their files all the same: the daemon
# mounts each file or subfolder by itself, and those are readable for all.
set -eu
umask 077
mkdir -p "$1"
cd "$1"
if ! [ -O . ]; then
  echo "$1 belongs to another user of this host, who could change what is started; chown it to $(id -un)" >&2
  exit 1
fi
chmod 700 .
umask 022
mkdir -p secrets
chmod 700 secrets
rm -rf .incoming
trap 'rm -rf "$PWD/.incoming"' EXIT
mkdir -m 700 .incoming
tar -x -p --no-same-owner -C .incoming -f -
(cd .incoming && find . -type d) | while IFS= read -r folder; do mkdir -p "$folder"; done
(cd .incoming && find . ! -type d) | while IFS= read -r file; do mv -f ".incoming/$file" "$file"; done
