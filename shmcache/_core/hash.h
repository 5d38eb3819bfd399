/* hash.h - keyed hash of keys and check of items.
 *
 * One primitive: the 128-bit product of two words, folded by exclusive or (the wyhash family's mixing step).  Every word
 * of input meets a secret drawn per segment before it is multiplied, so nobody without the segment's key can prepare a
 * factor of zero or a set of colliding keys.  Placement bounds what a collision could cost anyway: a key has two
 * buckets of seven entries, whatever it hashes to.  SipHash-1-3 costs two to three times as much on 17-byte keys and buys
 * resistance against somebody who can read hashes, which no caller can.
 *
 * The check is for rot and for bytes of a page's former life, not against somebody who may write the segment. */
#ifndef SC_HASH_H
#define SC_HASH_H
#include "atomics.h"
#include "layout.h"

#define SC_SUM_WORDS 32u /* 128 bytes of value take a step of the sum, 16 bytes at a time */
typedef struct {
    u64 s[6];
    u32 sum[SC_SUM_WORDS];
} sc_secret_t;

__extension__ typedef unsigned __int128 sc_u128;

static inline u64 sc_fold(u64 a, u64 b)
{
    sc_u128 m = (sc_u128)a * b;
    return (u64)m ^ (u64)(m >> 64);
}
static inline u64 sc_r8(const u8 *p)
{
    u64 v;
    memcpy(&v, p, 8);
    return v;
}
static inline u64 sc_r4(const u8 *p)
{
    u32 v;
    memcpy(&v, p, 4);
    return v;
}

/* Six secrets of at least 12 set and 12 clear bits each, and the words of the sum, from 128 random bits. */
static inline void sc_secret_init(sc_secret_t *sec, const u64 key[2])
{
    u64 x = key[0], y = key[1] | 1u;
    for (u32 i = 0; i < 6 + SC_SUM_WORDS;) {
        x += 0x9E3779B97F4A7C15ull;
        u64 v = sc_fold(x ^ key[1], y ^ 0xD6E8FEB86659FD93ull);
        y += 0xA24BAED4963EE407ull;
        int ones = __builtin_popcountll(v);
        if (i >= 6)
            sec->sum[i++ - 6] = (u32)(v >> 16);
        else if (ones >= 12 && ones <= 52)
            sec->s[i++] = v | 1u;
    }
}

/* Lanes of 16 bytes run in parallel and the last ones overlap, so that no length has a serial tail: two multiplications
 * deep up to 32 bytes, three up to 128. */
#define SC_LANE(i, q) sc_fold(sc_r8(q) ^ s[i], sc_r8((q) + 8) ^ acc)
#define SC_LANE_ON(i, q, lane) sc_fold(sc_r8(q) ^ s[i], sc_r8((q) + 8) ^ (lane))
static __attribute__((noinline, unused)) u64 sc_hash_long(const sc_secret_t *sec, const u8 *p, size_t n, u64 acc)
{
    const u64 *s = sec->s;
    const u8 *end = p + n;
    u64 a, b, c, d;
    if (n <= 64) {
        a = SC_LANE(1, p);
        b = SC_LANE(2, p + 16);
        c = SC_LANE(3, end - 32);
        d = SC_LANE(4, end - 16);
    } else {
        const u8 *last = end - 64;
        a = SC_LANE(1, p);
        b = SC_LANE(2, p + 16);
        c = SC_LANE(3, p + 32);
        d = SC_LANE(4, p + 48);
        for (p += 64; p < last; p += 64) {
            a = SC_LANE_ON(1, p, a);
            b = SC_LANE_ON(2, p + 16, b);
            c = SC_LANE_ON(3, p + 32, c);
            d = SC_LANE_ON(4, p + 48, d);
        }
        a = SC_LANE_ON(1, last, a);
        b = SC_LANE_ON(2, last + 16, b);
        c = SC_LANE_ON(3, last + 32, c);
        d = SC_LANE_ON(4, last + 48, d);
    }
    a = sc_fold(a ^ s[2], b ^ s[0]);
    c = sc_fold(c ^ s[3], d ^ s[1]);
    return sc_fold(a ^ s[5], c ^ (u64)n ^ s[3]);
}
SC_INLINE u64 sc_hash(const sc_secret_t *sec, const void *data, size_t n, u64 seed)
{
    const u64 *s = sec->s;
    const u8 *p = (const u8 *)data, *end = p + n;
    u64 a, b, acc = seed ^ s[0];
    if (SC_UNLIKELY(n > 32))
        return sc_hash_long(sec, p, n, acc);
    if (SC_LIKELY(n > 16)) {
        a = SC_LANE(1, p);
        b = SC_LANE(2, end - 16);
    } else if (n >= 8) {
        a = sc_fold(sc_r8(p) ^ s[1], acc);
        b = sc_fold(sc_r8(end - 8) ^ s[2], acc);
    } else if (n >= 4) {
        a = sc_fold(sc_r4(p) ^ s[1], sc_r4(end - 4) ^ acc);
        b = acc;
    } else {
        u64 few = n == 0 ? 0 : (u64)p[0] | ((u64)p[n >> 1] << 8) | ((u64)p[n - 1] << 16);
        a = sc_fold(few ^ s[1], acc);
        b = acc;
    }
    return sc_fold(a ^ s[5], b ^ (u64)n ^ s[3]);
}
#undef SC_LANE_ON
#undef SC_LANE

/* Place of a key: 32 bits choose the bucket, 16 the tag, 16 the shard. */
static inline u32 sc_tag_of(u64 h)
{
    u32 tag = (u32)(h >> 32) & 0xFFFFu;
    return tag ? tag : 1u;
}
static inline u32 sc_shard_of(u64 h, u32 n_shards) { return (u32)(h >> 48) & (n_shards - 1u); }
static inline u32 sc_home_of(u64 h, u32 n_buckets) { return (u32)(((h & 0xFFFFFFFFull) * n_buckets) >> 32); }
/* The other bucket of an entry, from either bucket and the tag. */
static inline u32 sc_other_of(u32 bucket, u32 tag, u32 n_buckets)
{
    u32 mask = (n_buckets < SC_GROUP ? n_buckets : SC_GROUP) - 1u;
    u32 f = ((tag * 0x9E37u) >> 8) & mask;
    if (f == 0)
        f = 1u;
    return (bucket & ~mask) | ((bucket ^ f) & mask);
}

/* What a page's life and a place in it add to a check, so that equal bytes elsewhere or earlier do not pass. */
static inline u32 sc_place_mix(const sc_secret_t *sec, u64 life, u32 page, u32 off)
{
    return (u32)(sc_fold(life ^ sec->s[2], (((u64)page << 16) | off) ^ sec->s[4]) >> 16);
}
/* Header part: key hash, constant header word, soft deadline. */
static inline u64 sc_header_mix(const sc_secret_t *sec, u64 keyhash, u64 word0, u64 soft)
{
    return sc_fold(keyhash ^ sec->s[1], SC_W0_PLAIN(word0) ^ sec->s[3] ^ (soft << 1 | soft >> 63));
}
/* Content part: header and value; the number of a counter is left out because incr changes it in place. */
static inline u32 sc_content_mix(const sc_secret_t *sec, u64 header_mix, u64 value_hash)
{
    return (u32)(sc_fold(header_mix ^ value_hash, sec->s[5]) >> 16);
}

#define SC_SUM_STEP 0x9E3779B1u
#if defined(SC_SSE2) && defined(__GNUC__)
#define SC_AVX2 1
/* 128-byte steps of sc_sum with twice as wide registers; acc as there. Bytes done. */
__attribute__((target("avx2"), noinline, unused)) static size_t sc_sum_avx2(const u32 *words, u64 acc[2], u8 *to, const u8 *p,
                                                                             size_t n)
{
    const __m256i *key = (const __m256i *)(const void *)words, step = _mm256_set1_epi32((int)SC_SUM_STEP);
    __m256i sum = _mm256_setzero_si256(), x;
    size_t at = 0;
    for (; n - at > 128; at += 128) {
        for (u32 i = 0; i < 4; i++) {
            x = _mm256_loadu_si256((const __m256i *)(const void *)(p + at + 32 * i));
            if (to != NULL)
                _mm256_storeu_si256((__m256i *)(void *)(to + at + 32 * i), x);
            x = _mm256_add_epi32(x, _mm256_loadu_si256(key + i));
            sum = _mm256_add_epi64(sum, _mm256_mul_epu32(x, _mm256_shuffle_epi32(x, 0xB1)));
        }
        sum = _mm256_add_epi64(_mm256_mul_epu32(sum, step),
                               _mm256_slli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(sum, 32), step), 32));
    }
    __m128i both = _mm_add_epi64(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    memcpy(acc, &both, 16);
    return at;
}
#endif

/* Hash of a value longer than 32 bytes, which copies it as well unless dst is NULL: one pass over bytes that are most of
 * what a read or a set touches.  Per 128 bytes a keyed sum of 32-bit products (the NH family: two values that differ agree
 * with a chance of 2^-32), the steps chained by an odd factor; the last 16 bytes overlap, so no length has a serial tail. */
/* The first 0 to 7 sixteens from at on, without a loop's bookkeeping. */
#define SC_SUM_REST(at, sixteens)             \
    do {                                      \
        switch (sixteens) {                   \
        case 7:                               \
            SC_SUM_16((at) + 96, 6);          \
            __attribute__((fallthrough));     \
        case 6:                               \
            SC_SUM_16((at) + 80, 5);          \
            __attribute__((fallthrough));     \
        case 5:                               \
            SC_SUM_16((at) + 64, 4);          \
            __attribute__((fallthrough));     \
        case 4:                               \
            SC_SUM_16((at) + 48, 3);          \
            __attribute__((fallthrough));     \
        case 3:                               \
            SC_SUM_16((at) + 32, 2);          \
            __attribute__((fallthrough));     \
        case 2:                               \
            SC_SUM_16((at) + 16, 1);          \
            __attribute__((fallthrough));     \
        case 1:                               \
            SC_SUM_16((at), 0);               \
            break;                            \
        default:                              \
            break;                            \
        }                                     \
    } while (0)
SC_INLINE u64 sc_sum(const sc_secret_t *sec, void *dst, const void *src, size_t n)
{
    const u8 *p = (const u8 *)src;
    u8 *to = (u8 *)dst;
    size_t at = 0;
    u64 a, b;
#ifdef SC_SSE2
    __m128i acc = _mm_setzero_si128(), x;
    const __m128i *key = (const __m128i *)(const void *)sec->sum;
#define SC_SUM_16(at, i)                                                             \
    do {                                                                             \
        x = _mm_loadu_si128((const __m128i *)(const void *)(p + (at)));              \
        if (to != NULL)                                                              \
            _mm_storeu_si128((__m128i *)(void *)(to + (at)), x);                     \
        x = _mm_add_epi32(x, _mm_loadu_si128(key + (i)));                            \
        acc = _mm_add_epi64(acc, _mm_mul_epu32(x, _mm_shuffle_epi32(x, 0xB1)));      \
    } while (0)
    const __m128i step = _mm_set1_epi32((int)SC_SUM_STEP);
    u64 both[2];
#ifdef SC_AVX2
    if (n > 512 && __builtin_cpu_supports("avx2")) {
        at = sc_sum_avx2(sec->sum, both, to, p, n);
        acc = _mm_loadu_si128((const __m128i *)(const void *)both);
    }
#endif
    for (; n - at > 128; at += 128) {
        for (u32 i = 0; i < 8; i++)
            SC_SUM_16(at + 16 * i, i);
        acc = _mm_add_epi64(_mm_mul_epu32(acc, step), _mm_slli_epi64(_mm_mul_epu32(_mm_srli_epi64(acc, 32), step), 32));
    }
    SC_SUM_REST(at, (n - at - 1) / 16);
    SC_SUM_16(n - 16, 7);
    memcpy(both, &acc, 16);
    a = both[0];
    b = both[1];
#else
    const u32 *key = sec->sum;
    a = b = 0;
#define SC_SUM_16(at, i)                                                                       \
    do {                                                                                       \
        u32 x[4];                                                                              \
        memcpy(x, p + (at), 16);                                                               \
        if (to != NULL)                                                                        \
            memcpy(to + (at), x, 16);                                                          \
        a += (u64)(x[0] + key[4 * (i)]) * (x[1] + key[4 * (i) + 1]);                           \
        b += (u64)(x[2] + key[4 * (i) + 2]) * (x[3] + key[4 * (i) + 3]);                       \
    } while (0)
    for (; n - at > 128; at += 128) {
        for (u32 i = 0; i < 8; i++)
            SC_SUM_16(at + 16 * i, i);
        a *= SC_SUM_STEP;
        b *= SC_SUM_STEP;
    }
    SC_SUM_REST(at, (n - at - 1) / 16);
    SC_SUM_16(n - 16, 7);
#endif
#undef SC_SUM_16
#undef SC_SUM_REST
    return sc_fold(a ^ sec->s[4], b ^ (u64)n ^ sec->s[2]);
}

/* Hash of a value that lies at src, copied to dst on the way unless dst is NULL. */
SC_INLINE u64 sc_value_copy(const sc_secret_t *sec, u32 type, void *dst, const void *src, size_t n)
{
    if (SC_LIKELY(n > 32))
        return sc_sum(sec, dst, src, n);
    if (dst != NULL && n > 0) {
        memcpy(dst, src, n);
        src = dst; /* what is hashed is what the caller has, whoever writes to src meanwhile */
    }
    return SC_TYPE(type) == SC_T_INT ? sec->s[4] : sc_hash(sec, src, n, sec->s[4]);
}
static inline u64 sc_value_hash(const sc_secret_t *sec, u32 type, const void *v, size_t n)
{
    return sc_value_copy(sec, type, NULL, v, n);
}
#endif
