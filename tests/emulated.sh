#!/usr/bin/env bash
# The C tests on CPUs that this machine is not, under qemu-user: 64-bit Arm with and without dot products,
# x86-64 without AVX. Then test_hash must print on all of them what it prints natively.
# --short takes about a minute of two idle cores.
set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
model=$top/rwkv/rwkv_cpp/models/shakespeare.bin
work=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$work"' EXIT
unset RWKV_ISA

for tool in cmake qemu-x86_64 qemu-aarch64 aarch64-linux-gnu-gcc aarch64-linux-gnu-g++; do
    command -v "$tool" >/dev/null || {
        echo "error: no $tool (Debian: cmake qemu-user gcc-aarch64-linux-gnu g++-aarch64-linux-gnu)" >&2
        exit 1
    }
done
[ "$(uname -m)" = x86_64 ] || { echo "error: written for an x86-64 machine" >&2; exit 1; }

case ${1-} in
--short) short=true size=(2 1) ;; # tokens, layers
"") short=false size=(8 100) ;;
*) echo "usage: $0 [--short]" >&2; exit 2 ;;
esac

# build NAME OPTION...
build() {
    cmake -S "$top" -B "$work/$1" -DRWKV_BUILD_TESTS=ON -DBUILD_SHARED_LIBS=OFF "${@:2}" >/dev/null
    cmake --build "$work/$1" --parallel 2 >"$work/$1.log" 2>&1 || { cat "$work/$1.log"; exit 1; }
}

# run LABEL COMMAND...: what it prints goes to a file, its last line also here
run() {
    local start=$SECONDS file=$work/$1.txt
    "${@:2}" >"$file" 2>"$file.err" || { cat "$file" "$file.err"; echo "FAILED: ${*:2}"; exit 1; }
    printf '%-28s %s  (%d s)\n' "$1:" "$(tail -n 1 "$file")" $((SECONDS - start))
}

# hash LABEL LEVEL COMMAND...: test_hash, which must choose that level
hash() {
    run "$1" "${@:3}" "$model" "${size[@]}"
    grep -q "ISA=$2\$" "$work/$1.txt.err" || {
        echo "FAILED: $1 runs $(cat "$work/$1.txt.err"), expected $2"
        exit 1
    }
}

# qemu-user has no threads in the child of a process with threads
arm() {
    build arm -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_EXE_LINKER_FLAGS=-static \
        -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
    hash hash-neon neon qemu-aarch64 -cpu max "$work/arm/tests/test_hash"
    hash hash-arm-scalar scalar qemu-aarch64 -cpu cortex-a53 "$work/arm/tests/test_hash"
    run kernels-neon qemu-aarch64 -cpu max "$work/arm/tests/test_kernels"
    run threads-arm env TEST_WITHOUT_FORK=1 qemu-aarch64 -cpu max "$work/arm/tests/test_threads"
    $short && return
    run kernels-arm-scalar qemu-aarch64 -cpu cortex-a53 "$work/arm/tests/test_kernels"
    run quantize-arm qemu-aarch64 -cpu max "$work/arm/tests/test_quantize"
    run api-arm env TEST_WITHOUT_FORK=1 qemu-aarch64 -cpu max "$work/arm/tests/test_api"
}

x86() {
    build x86
    run hash-native "$work/x86/tests/test_hash" "$model" "${size[@]}"
    hash hash-without-avx sse2 qemu-x86_64 -cpu Nehalem "$work/x86/tests/test_hash"
    $short && return
    run kernels-without-avx qemu-x86_64 -cpu Nehalem "$work/x86/tests/test_kernels"
    run quantize-without-avx qemu-x86_64 -cpu Nehalem "$work/x86/tests/test_quantize"
    run threads-without-avx env TEST_WITHOUT_FORK=1 qemu-x86_64 -cpu Nehalem "$work/x86/tests/test_threads"
    run api-without-avx env TEST_WITHOUT_FORK=1 qemu-x86_64 -cpu Nehalem "$work/x86/tests/test_api"
}

arm &
first=$!
x86 &
second=$!
wait $first
wait $second
for hashes in "$work"/hash-*.txt; do
    diff "$work/hash-native.txt" "$hashes" || { echo "FAILED: other bits in $(basename "$hashes")"; exit 1; }
done
echo "the same $(wc -l <"$work/hash-native.txt") hashes everywhere ($SECONDS s)"
