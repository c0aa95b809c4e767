/* CPU features, and how many cores this process may use. */
#if defined(__linux__)
#define _GNU_SOURCE
#endif
#include "cpu.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ggml.h"

/* ---- Features ------------------------------------------------------------------------------- */

#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64) || defined(_M_IX86)

#if defined(_MSC_VER)
#include <intrin.h>

static void cpuid(uint32_t leaf, uint32_t part, uint32_t r[4]) {
    int out[4];
    __cpuidex(out, (int)leaf, (int)part);
    memcpy(r, out, sizeof out);
}

static uint64_t saved_registers(void) {
    return _xgetbv(0);
}
#else
#include <cpuid.h>

static void cpuid(uint32_t leaf, uint32_t part, uint32_t r[4]) {
    __cpuid_count(leaf, part, r[0], r[1], r[2], r[3]);
}

static uint64_t saved_registers(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}
#endif

static const uint32_t known = CPU_SSE2 | CPU_AVX | CPU_AVX2 | CPU_FMA | CPU_F16C | CPU_AVX512F |
                              CPU_AVX512BW | CPU_AVX512DQ | CPU_AVX512VL | CPU_AVX512VNNI |
                              CPU_AVX512BF16 | CPU_AMX_INT8 | CPU_AMX_BF16;

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>

/* Linux gives tiles, 8 KiB of registers for each thread, only to processes that ask for them
 * (Documentation/arch/x86/xstate.rst). Threads inherit the permission. */
static bool tiles_permitted(void) {
    const int request_permission = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM */
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#else
static bool tiles_permitted(void) {
    return false;
}
#endif

static uint32_t flag(uint32_t word, int bit, uint32_t feature) {
    return word >> bit & 1 ? feature : 0;
}

/* A feature counts only if the operating system saves its registers (XCR0) when it switches
 * threads. */
uint32_t ggml_cpu_detect(void) {
    const uint64_t ymm = 0x06, zmm = 0xE6, tiles = 0x60000;
    uint32_t r[4] = {0}, leaf7[4] = {0}, more[4] = {0};
    cpuid(0, 0, r);
    uint32_t max_leaf = r[0];
    cpuid(1, 0, r);
    bool osxsave = r[2] >> 27 & 1;
    uint64_t saved = osxsave ? saved_registers() : 0;
    if (max_leaf >= 7) cpuid(7, 0, leaf7);
    if (leaf7[0] >= 1) cpuid(7, 1, more);
    uint32_t features = flag(r[3], 26, CPU_SSE2);
    if ((saved & ymm) == ymm && (r[2] >> 28 & 1)) {
        features |= CPU_AVX | flag(r[2], 12, CPU_FMA) | flag(r[2], 29, CPU_F16C) |
                    flag(leaf7[1], 5, CPU_AVX2);
    }
    if ((saved & zmm) == zmm && (leaf7[1] >> 16 & 1)) {
        features |= CPU_AVX512F | flag(leaf7[1], 17, CPU_AVX512DQ) |
                    flag(leaf7[1], 30, CPU_AVX512BW) | flag(leaf7[1], 31, CPU_AVX512VL) |
                    flag(leaf7[2], 11, CPU_AVX512VNNI) | flag(more[0], 5, CPU_AVX512BF16);
    }
    if ((leaf7[3] >> 24 & 1) && (leaf7[3] >> 25 & 1)) {
        const bool usable = (saved & tiles) == tiles && tiles_permitted();
        features |= usable ? CPU_AMX_INT8 | flag(leaf7[3], 22, CPU_AMX_BF16) : CPU_AMX_REFUSED;
    }
    return features;
}

#elif defined(__aarch64__) || defined(_M_ARM64)

static const uint32_t known = CPU_NEON | CPU_DOTPROD | CPU_I8MM;

#if defined(__linux__)
#include <sys/auxv.h>

uint32_t ggml_cpu_detect(void) {
    uint32_t features = CPU_NEON;
    if (getauxval(AT_HWCAP) >> 20 & 1) features |= CPU_DOTPROD;
    if (getauxval(AT_HWCAP2) >> 13 & 1) features |= CPU_I8MM;
    return features;
}
#elif defined(__APPLE__)
#include <sys/sysctl.h>

static uint32_t flag(const char * name, uint32_t feature) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, NULL, 0) == 0 && value != 0 ? feature : 0;
}

uint32_t ggml_cpu_detect(void) {
    return CPU_NEON | flag("hw.optional.arm.FEAT_DotProd", CPU_DOTPROD) |
           flag("hw.optional.arm.FEAT_I8MM", CPU_I8MM);
}
#elif defined(_WIN32)
#include <windows.h>

uint32_t ggml_cpu_detect(void) {
    const DWORD dot_products = 43; /* PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE in newer headers */
    return CPU_NEON | (IsProcessorFeaturePresent(dot_products) ? CPU_DOTPROD : 0);
}
#else
uint32_t ggml_cpu_detect(void) {
    return CPU_NEON;
}
#endif

#else

static const uint32_t known = 0;

uint32_t ggml_cpu_detect(void) {
    return 0;
}

#endif

void ggml_cpu_describe(uint32_t features, char * text, size_t size) {
    static const struct {
        uint32_t feature;
        const char * name;
    } names[] = {
        {CPU_SSE2, "SSE2"},
        {CPU_AVX, "AVX"},
        {CPU_AVX2, "AVX2"},
        {CPU_FMA, "FMA"},
        {CPU_F16C, "F16C"},
        {CPU_AVX512F, "AVX512F"},
        {CPU_AVX512BW, "AVX512BW"},
        {CPU_AVX512DQ, "AVX512DQ"},
        {CPU_AVX512VL, "AVX512VL"},
        {CPU_AVX512VNNI, "AVX512_VNNI"},
        {CPU_AVX512BF16, "AVX512_BF16"},
        {CPU_NEON, "NEON"},
        {CPU_DOTPROD, "DOTPROD"},
        {CPU_I8MM, "I8MM"},
        {CPU_AMX_INT8, "AMX_INT8"},
        {CPU_AMX_BF16, "AMX_BF16"},
    };
    size_t used = 0;
    text[0] = 0;
    for (size_t i = 0; i < sizeof names / sizeof *names && used < size; i++) {
        if (!(names[i].feature & known)) continue;
        const char * value = features & names[i].feature ? "1" : "0";
        if (names[i].feature == CPU_AMX_INT8 && (features & CPU_AMX_REFUSED)) value = "refused";
        used += (size_t)snprintf(text + used, size - used, "%s%s=%s", used ? " " : "",
                                 names[i].name, value);
    }
}

/* ---- Cores ---------------------------------------------------------------------------------- */

#if defined(__linux__)
#include <sched.h>

static long read_number(const char * path) {
    long number = -1;
    FILE * file = fopen(path, "r");
    if (!file) return -1;
    if (fscanf(file, "%ld", &number) != 1) number = -1;
    fclose(file);
    return number;
}

/* Which physical core the logical CPU belongs to; itself where the system doesn't say. */
static long core_of(int cpu) {
    char path[96];
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/core_id", cpu);
    long core = read_number(path);
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/physical_package_id", cpu);
    long package = read_number(path);
    return core < 0 || package < 0 ? -1 - cpu : package << 20 | core;
}

/* Distinct cores among the CPUs of the affinity mask. */
static unsigned count_cores(void) {
    enum { MAX_CPUS = 8192 };
    unsigned count = 0;
    size_t size = CPU_ALLOC_SIZE(MAX_CPUS);
    cpu_set_t * mask = CPU_ALLOC(MAX_CPUS);
    long * seen = malloc(MAX_CPUS * sizeof *seen);
    if (mask && seen && sched_getaffinity(0, size, mask) == 0) {
        for (int cpu = 0; cpu < MAX_CPUS; cpu++) {
            if (!CPU_ISSET_S((size_t)cpu, size, mask)) continue;
            long core = core_of(cpu);
            unsigned i = 0;
            while (i < count && seen[i] != core) i++;
            if (i == count) seen[count++] = core;
        }
    }
    free(seen);
    if (mask) CPU_FREE(mask);
    return count ? count : 1;
}

/* CPUs' worth of time that this group of processes may use; 0 if that is not limited. */
static double group_quota(bool version2, const char * folder) {
    char path[1024];
    long quota = -1, period = -1;
    if (version2) {
        snprintf(path, sizeof path, "/sys/fs/cgroup%s/cpu.max", folder);
        FILE * file = fopen(path, "r");
        if (!file) return 0;
        if (fscanf(file, "%ld %ld", &quota, &period) != 2) quota = -1; /* "max 100000" */
        fclose(file);
    } else {
        snprintf(path, sizeof path, "/sys/fs/cgroup/cpu%s/cpu.cfs_quota_us", folder);
        quota = read_number(path);
        snprintf(path, sizeof path, "/sys/fs/cgroup/cpu%s/cpu.cfs_period_us", folder);
        period = read_number(path);
    }
    return quota > 0 && period > 0 ? (double)quota / (double)period : 0;
}

/* The strictest limit from our own group up to the root. In a container, /proc names the folder as
 * the host sees it; what does not exist limits nothing. */
static unsigned limit_by_groups(unsigned cores) {
    FILE * file = fopen("/proc/self/cgroup", "r");
    if (!file) return cores;
    char line[900];
    while (fgets(line, sizeof line, file)) {
        /* "0::/path" in version 2, "4:cpu,cpuacct:/path" in version 1 */
        char * controllers = strchr(line, ':');
        char * folder = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!folder) continue;
        *folder++ = 0;
        folder[strcspn(folder, "\n")] = 0;
        controllers++;
        bool version2 = *controllers == 0;
        if (!version2 && strcmp(controllers, "cpu") != 0 && strncmp(controllers, "cpu,", 4) != 0 &&
            !strstr(controllers, ",cpu,"))
            continue;
        for (;;) {
            double quota = group_quota(version2, folder);
            if (quota > 0 && quota < cores) cores = (unsigned)quota + (quota > (unsigned)quota);
            char * slash = strrchr(folder, '/');
            if (!slash) break;
            *slash = 0;
        }
    }
    fclose(file);
    return cores;
}

unsigned ggml_default_threads(void) {
    return limit_by_groups(count_cores());
}

#elif defined(__APPLE__)
#include <sys/sysctl.h>

unsigned ggml_default_threads(void) {
    int cores = 0;
    size_t size = sizeof cores;
    if (sysctlbyname("hw.perflevel0.physicalcpu", &cores, &size, NULL, 0) != 0)
        sysctlbyname("hw.physicalcpu", &cores, &size, NULL, 0);
    return cores > 0 ? (unsigned)cores : 1;
}

#elif defined(_WIN32)
#include <windows.h>

/* Cores of this process's affinity mask (within one group of 64 CPUs). */
unsigned ggml_default_threads(void) {
    DWORD_PTR mask, system_mask;
    DWORD size = 0;
    unsigned cores = 0;
    GetLogicalProcessorInformation(NULL, &size);
    SYSTEM_LOGICAL_PROCESSOR_INFORMATION * info = malloc(size);
    if (info && GetProcessAffinityMask(GetCurrentProcess(), &mask, &system_mask) &&
        GetLogicalProcessorInformation(info, &size)) {
        for (size_t i = 0; i < size / sizeof *info; i++)
            cores += info[i].Relationship == RelationProcessorCore &&
                     (info[i].ProcessorMask & mask) != 0;
    }
    free(info);
    return cores ? cores : 1;
}

#else

unsigned ggml_default_threads(void) {
    return 1;
}

#endif
