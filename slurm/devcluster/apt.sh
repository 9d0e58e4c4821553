#!/bin/sh
# apt-get ARGUMENTS, after whoever holds one of its locks: a machine that has just started often updates itself.
# APT_WAIT_S: how long to wait at most, 300 s by default.
left=${APT_WAIT_S:-300}
export LC_ALL=C DEBIAN_FRONTEND=noninteractive
while true; do
  said=$(apt-get "$@" 2>&1) && code=0 || code=$?
  printf '%s\n' "$said"
  case $said in
    *"Could not get lock"* | *"Unable to acquire the dpkg frontend lock"* | *"Unable to lock"*) ;;
    *) exit "$code" ;;
  esac
  [ "$code" != 0 ] && [ "$left" -gt 0 ] || exit "$code"
  left=$((left - 1))
  sleep 1
done
