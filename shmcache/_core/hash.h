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

typedef struct {
    u64 s[6];
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

/* Six secrets of at least 12 set and 12 clear bits each, from 128 random bits. */
static inline void sc_secret_init(sc_secret_t *sec, const u64 key[2])
{
    u64 x = key[0], y = key[1] | 1u;
    for (int i = 0; i < 6;) {
        x += 0x9E3779B97F4A7C15ull;
        u64 v = sc_fold(x ^ key[1], y ^ 0xD6E8FEB86659FD93ull);
        y += 0xA24BAED4963EE407ull;
        int ones = __builtin_popcountll(v);
        if (ones >= 12 && ones <= 52)
            sec->s[i++] = v | 1u;
    }
}

/* Lanes of 16 bytes run in parallel and the last ones overlap, so that no length has a serial tail: two multiplications
 * deep up to 32 bytes, three up to 128. */
#define SC_LANE(i, q) sc_fold(sc_r8(q) ^ s[i], sc_r8((q) + 8) ^ acc)
static inline u64 sc_hash(const sc_secret_t *sec, const void *data, size_t n, u64 seed)
{
    const u64 *s = sec->s;
    const u8 *p = (const u8 *)data, *end = p + n;
    u64 a, b, acc = seed ^ s[0], len = (u64)n;
    if (SC_LIKELY(n <= 32)) {
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
        return sc_fold(a ^ s[5], b ^ len ^ s[3]);
    }
    u64 c, d;
    if (n <= 64) {
        a = SC_LANE(1, p);
        b = SC_LANE(2, p + 16);
        c = SC_LANE(3, end - 32);
        d = SC_LANE(4, end - 16);
    } else {
        a = b = c = d = acc;
        const u8 *last = end - 64;
        for (; p < last; p += 64) {
            a = sc_fold(sc_r8(p) ^ s[1], sc_r8(p + 8) ^ a);
            b = sc_fold(sc_r8(p + 16) ^ s[2], sc_r8(p + 24) ^ b);
            c = sc_fold(sc_r8(p + 32) ^ s[3], sc_r8(p + 40) ^ c);
            d = sc_fold(sc_r8(p + 48) ^ s[4], sc_r8(p + 56) ^ d);
        }
        a = sc_fold(sc_r8(last) ^ s[1], sc_r8(last + 8) ^ a);
        b = sc_fold(sc_r8(last + 16) ^ s[2], sc_r8(last + 24) ^ b);
        c = sc_fold(sc_r8(last + 32) ^ s[3], sc_r8(last + 40) ^ c);
        d = sc_fold(sc_r8(last + 48) ^ s[4], sc_r8(last + 56) ^ d);
    }
    a = sc_fold(a ^ s[2], b ^ s[0]);
    c = sc_fold(c ^ s[3], d ^ s[1]);
    return sc_fold(a ^ s[5], c ^ len ^ s[3]);
}
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
static inline u64 sc_value_hash(const sc_secret_t *sec, u32 type, const void *v, size_t n)
{
    return SC_TYPE(type) == SC_T_INT ? sec->s[4] : sc_hash(sec, v, n, sec->s[4]);
}
#endif
