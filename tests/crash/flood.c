/* flood.c - keys that collide under a hash an attacker can compute: `flood HASH N` prints N of them, one a line.
 *
 * HASH: fnv1a, xxh64 (seed 0), or segment (this library's own with a key of zeros).  The keys agree in the low 12 bits of
 * fnv1a and xxh64, as in a table of 4,096 buckets that masks its hash; under `segment` in the home bucket of such a table. */
#include "hash.h"
#include <stdio.h>
#include <stdlib.h>

#define BUCKETS 4096u

static u64 fnv1a(const u8 *p, size_t n)
{
    u64 h = 0xCBF29CE484222325ull;
    for (size_t i = 0; i < n; i++)
        h = (h ^ p[i]) * 0x100000001B3ull;
    return h;
}

#define P1 0x9E3779B185EBCA87ull
#define P2 0xC2B2AE3D27D4EB4Full
#define P3 0x165667B19E3779F9ull
#define P4 0x85EBCA77C2B2AE63ull
#define P5 0x27D4EB2F165667C5ull
static u64 turn(u64 x, int r) { return x << r | x >> (64 - r); }
static u64 xxh64(const u8 *p, size_t n) /* below 32 bytes, seed 0 */
{
    const u8 *end = p + n;
    u64 h = P5 + n;
    for (; p + 8 <= end; p += 8)
        h = turn(h ^ (turn(sc_r8(p) * P2, 31) * P1), 27) * P1 + P4;
    if (p + 4 <= end) {
        h = turn(h ^ (sc_r4(p) * P1), 23) * P2 + P3;
        p += 4;
    }
    for (; p < end; p++)
        h = turn(h ^ (*p * P5), 11) * P1;
    h = (h ^ h >> 33) * P2;
    h = (h ^ h >> 29) * P3;
    return h ^ h >> 32;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    sc_secret_t secret;
    const u64 zeros[2] = {0, 0};
    sc_secret_init(&secret, zeros);
    long left = atol(argv[2]);
    for (u64 i = 0; left > 0; i++) {
        char key[32];
        size_t n = (size_t)snprintf(key, sizeof key, "user%012llu", (unsigned long long)i);
        const u8 *p = (const u8 *)key;
        u64 h = argv[1][0] == 'f' ? fnv1a(p, n) : argv[1][0] == 'x' ? xxh64(p, n) : sc_hash(&secret, p, n, 0);
        u32 bucket = argv[1][0] == 's' ? sc_home_of(h, BUCKETS) : (u32)h & (BUCKETS - 1u);
        if (bucket != 0)
            continue;
        puts(key);
        left--;
    }
    return 0;
}
