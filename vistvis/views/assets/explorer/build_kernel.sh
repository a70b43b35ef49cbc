#!/bin/sh
# kernel.c as kernel.wasm: `sh build_kernel.sh [OUT]`. Needs clang and wasm-ld (14 made what is here).
# Two steps, because clang alone also runs a wasm-opt where it finds one, and bytes would differ.
set -e
here=$(dirname "$0")
object=$(mktemp)
trap 'rm -f "$object"' EXIT
clang --target=wasm32 -msimd128 -O3 -ffreestanding -nostdlib -Wall -Wextra -Werror \
  -c -o "$object" "$here/kernel.c"
wasm-ld --no-entry --strip-all -z stack-size=4096 --export=__heap_base \
  -o "${1:-$here/kernel.wasm}" "$object"
