/* Peaks of one core, one "name value" a line: 10^9 operations a second of the multiply-accumulate
 * instructions (two operations a multiply-add, 0 where the CPU lacks them) and 10^9 bytes a second of
 * reading from each level of memory.
 *
 * The instructions stand in inline assembly, so that no compiler can hoist or shorten them; twelve
 * independent accumulators cover latency times throughput. Windows are about a millisecond long and
 * the best of many counts: on a busy machine longer ones are interrupted.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define WINDOWS 400
#define STEPS 60000L

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#define ONE(op, r, n) op " %%" r "14, %%" r "15, %%" r #n "\n\t"
#define TWELVE(op, r)                                                                          \
    ONE(op, r, 0) ONE(op, r, 1) ONE(op, r, 2) ONE(op, r, 3) ONE(op, r, 4) ONE(op, r, 5)        \
    ONE(op, r, 6) ONE(op, r, 7) ONE(op, r, 8) ONE(op, r, 9) ONE(op, r, 10) ONE(op, r, 11)

/* vpmaddwd has no accumulator: the sum is an instruction of its own. */
#define PAIR(r, n)                                                                             \
    "vpmaddwd %%" r "14, %%" r "15, %%" r "13\n\tvpaddd %%" r "13, %%" r #n ", %%" r #n "\n\t"
#define TWELVE_PAIRS(r)                                                                        \
    PAIR(r, 0) PAIR(r, 1) PAIR(r, 2) PAIR(r, 3) PAIR(r, 4) PAIR(r, 5)                          \
    PAIR(r, 6) PAIR(r, 7) PAIR(r, 8) PAIR(r, 9) PAIR(r, 10) PAIR(r, 11)

#define PEAK(name, isa, operations, body)                                                      \
    __attribute__((target(isa), noinline)) static double name(void)                            \
    {                                                                                          \
        double best = 0;                                                                       \
        for (int window = 0; window < WINDOWS; window++) {                                     \
            long left = STEPS;                                                                 \
            double start = seconds(), rate;                                                    \
            __asm__ volatile("vzeroall\n1:\n\t" body "dec %0\n\tjnz 1b\n\tvzeroall\n"          \
                             : "+r"(left)                                                      \
                             :                                                                 \
                             : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6",   \
                               "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13",     \
                               "xmm14", "xmm15");                                              \
            rate = 12e-9 * (operations) * STEPS / (seconds() - start);                         \
            best = rate > best ? rate : best;                                                  \
        }                                                                                      \
        return best;                                                                           \
    }

PEAK(fma_256, "avx2,fma", 16, TWELVE("vfmadd231ps", "ymm"))
PEAK(fma_512, "avx512f", 32, TWELVE("vfmadd231ps", "zmm"))
PEAK(maddwd_256, "avx2", 32, TWELVE_PAIRS("ymm"))
PEAK(maddwd_512, "avx512bw", 64, TWELVE_PAIRS("zmm"))
PEAK(dpbusd_512, "avx512vnni", 128, TWELVE("vpdpbusd", "zmm"))
PEAK(dpwssd_512, "avx512vnni", 64, TWELVE("vpdpwssd", "zmm"))

static double larger(double a, double b)
{
    return a > b ? a : b;
}

/* Eight words of every cache line: with 64-bit loads a core does not reach its L1 bandwidth, with
 * vectors it does. */
__attribute__((target("avx2"), noinline)) static double reading(size_t bytes)
{
    char *memory = aligned_alloc(4096, bytes);
    size_t passes = 4000000 / bytes + 1;
    double best = 0;
    if (memory == NULL)
        return 0;
    for (size_t i = 0; i < bytes; i++)
        memory[i] = (char)i;
    for (int window = 0; window < WINDOWS / 4; window++) {
        double start = seconds(), rate;
        for (size_t pass = 0; pass < passes; pass++)
            for (const char *p = memory; p < memory + bytes; p += 256)
                __asm__ volatile("vmovdqu (%0), %%ymm0\n\tvmovdqu 32(%0), %%ymm1\n\t"
                                 "vmovdqu 64(%0), %%ymm2\n\tvmovdqu 96(%0), %%ymm3\n\t"
                                 "vmovdqu 128(%0), %%ymm4\n\tvmovdqu 160(%0), %%ymm5\n\t"
                                 "vmovdqu 192(%0), %%ymm6\n\tvmovdqu 224(%0), %%ymm7\n\t"
                                 :
                                 : "r"(p)
                                 : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",
                                   "memory");
        rate = 1e-9 * (double)bytes * (double)passes / (seconds() - start);
        best = larger(best, rate);
    }
    free(memory);
    return best;
}

int main(void)
{
    int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    int vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
        fputs("core_peaks: needs AVX2 and FMA\n", stderr);
        return 1;
    }
    printf("fma %.1f\n", larger(fma_256(), avx512 ? fma_512() : 0));
    printf("vpmaddwd %.1f\n", larger(maddwd_256(), avx512 ? maddwd_512() : 0));
    printf("vpdpwssd %.1f\n", vnni ? dpwssd_512() : 0);
    printf("vpdpbusd %.1f\n", vnni ? dpbusd_512() : 0);
    printf("L1 %.1f\n", reading(16u << 10));
    printf("L2 %.1f\n", reading(512u << 10));
    printf("L3 %.1f\n", reading(8u << 20));
    printf("DRAM %.1f\n", reading(256u << 20));
    return 0;
}
