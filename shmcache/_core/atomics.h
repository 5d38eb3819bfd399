/* atomics.h - the memory operations on shared words, by the names used in comments and in DESIGN.md.
 *
 * Item bytes are copied by sc_copy between two compiler barriers: a concurrent writer may tear them, and the reader
 * throws torn bytes away after comparing entry and life (table.c, R1). */
#ifndef SC_ATOMICS_H
#define SC_ATOMICS_H
#include <string.h>
#if defined(__SSE2__) && !defined(SC_SCALAR) /* SC_SCALAR: tests take the portable forms on any machine */
#define SC_SSE2 1
#include <immintrin.h>
#endif

#define SC_LD(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define SC_LD_ACQ(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define SC_ST(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define SC_ST_REL(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define SC_FENCE_ACQ() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#define SC_FENCE_REL() __atomic_thread_fence(__ATOMIC_RELEASE)
#define SC_FENCE() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define SC_BARRIER() __asm__ volatile("" ::: "memory")
#define SC_LIKELY(x) __builtin_expect(!!(x), 1)
#define SC_UNLIKELY(x) __builtin_expect(!!(x), 0)
#define SC_INLINE static inline __attribute__((always_inline))
#define SC_PREFETCH(p) __builtin_prefetch((p), 0, 3)

#if defined(__x86_64__) || defined(__i386__)
#define SC_PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define SC_PAUSE() __asm__ volatile("yield")
#else
#define SC_PAUSE() SC_BARRIER()
#endif

static inline void sc_copy(void *dst, const void *src, size_t n)
{
    SC_BARRIER();
    memcpy(dst, src, n);
    SC_BARRIER();
}
static inline int sc_same(const void *a, const void *b, size_t n)
{
    const unsigned char *p = (const unsigned char *)a, *q = (const unsigned char *)b;
    SC_BARRIER();
    int same;
    if (n >= 8 && n <= 32) { /* most keys: two overlapping words of 8 or 16 bytes, no call */
#ifdef SC_SSE2
        if (n >= 16) {
            const __m128i *a0 = (const __m128i *)(const void *)p, *a1 = (const __m128i *)(const void *)(p + n - 16);
            const __m128i *b0 = (const __m128i *)(const void *)q, *b1 = (const __m128i *)(const void *)(q + n - 16);
            __m128i first = _mm_cmpeq_epi8(_mm_loadu_si128(a0), _mm_loadu_si128(b0));
            __m128i last = _mm_cmpeq_epi8(_mm_loadu_si128(a1), _mm_loadu_si128(b1));
            same = _mm_movemask_epi8(_mm_and_si128(first, last)) == 0xFFFF;
            SC_BARRIER();
            return same;
        }
#endif
        unsigned long long x, y, diff = 0;
        size_t i = 0;
        for (; i + 8 < n; i += 8) {
            memcpy(&x, p + i, 8);
            memcpy(&y, q + i, 8);
            diff |= x ^ y;
        }
        memcpy(&x, p + n - 8, 8);
        memcpy(&y, q + n - 8, 8);
        same = (diff | (x ^ y)) == 0;
    } else {
        same = memcmp(p, q, n) == 0;
    }
    SC_BARRIER();
    return same;
}

/* The same where a forged chain can make source and target one. */
static inline void sc_move(void *dst, const void *src, size_t n)
{
    SC_BARRIER();
    memmove(dst, src, n);
    SC_BARRIER();
}

/* Places where tests stop or kill a process, and which operation is running there; nothing in a product build. */
#ifdef SC_CRASH_POINTS
extern void sc_crashpoint(int *number, const char *name);
extern void sc_crash_operation(const char *name);
#define SC_CRASHPOINT(name) \
    do { \
        static int sc_point; \
        sc_crashpoint(&sc_point, #name); \
    } while (0)
#define SC_CRASH_OP(name) sc_crash_operation(name)
#else
#define SC_CRASHPOINT(name) ((void)0)
#define SC_CRASH_OP(name) ((void)0)
#endif
#endif
