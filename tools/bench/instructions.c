/* instructions.c - a fixed number of each kind of call on a warm segment, for counting instructions.
 *
 *   instructions CALLS
 *
 * 10,000 items of 17 + 100 bytes in 8 MiB, one shard; the log has gone round before the counted calls begin, so a set pays
 * for the memory it takes.  Only what runs inside counted_get, _miss, _set and _incr is to be counted. */
#include "drive.h"

#define KEYS 10000u
#define SIZE 100u

static char keys[KEYS][18];
static u8 value[SIZE], copy[SIZE];

static void store(sc_table_t *t, u32 i)
{
    sc_key_t k;
    sc_cond_t cond;
    sc_value_t v = {value, 0, SIZE, SC_T_BYTES, 0, 0};
    memset(&cond, 0, sizeof cond);
    sc_key_init(t, &k, keys[i], 17);
    if (sc_store(t, &k, &v, &cond, WAIT_NS) != SC_OK)
        die("set", "not stored");
}
__attribute__((noinline)) static void counted_set(sc_table_t *t, u32 i) { store(t, i); }
__attribute__((noinline)) static void counted_get(sc_table_t *t, u32 i)
{
    sc_key_t k;
    sc_found_t f;
    sc_key_init(t, &k, keys[i], 17);
    if (sc_get_begin(t, &k, &f) != SC_HIT || sc_get_finish(t, &k, &f, copy, 1) != SC_HIT)
        die("get", "missed");
}
__attribute__((noinline)) static void counted_miss(sc_table_t *t, u32 i)
{
    sc_key_t k;
    sc_found_t f;
    char absent[18];
    memcpy(absent, keys[i], 17);
    absent[0] = 'P';
    sc_key_init(t, &k, absent, 17);
    if (sc_get_begin(t, &k, &f) == SC_HIT)
        die("miss", "found");
}
__attribute__((noinline)) static void counted_incr(sc_table_t *t, u32 i)
{
    sc_key_t k;
    i64 result;
    (void)i;
    sc_key_init(t, &k, "counter_of_logins", 17);
    if (sc_incr(t, &k, 1, 1, 0, 0, &result, WAIT_NS) != SC_OK)
        die("incr", "not stored");
}

int main(int argc, char **argv)
{
    if (argc != 2)
        die("usage", "CALLS");
    u32 calls = (u32)number(argv[1]), at = 1;
    sc_table_t *t = open_table(8u << 20, 256, 1, 1, 600000, 0);
    for (u32 i = 0; i < SIZE; i++)
        value[i] = (u8)(i * 31u);
    for (u32 i = 0; i < KEYS; i++) {
        snprintf(keys[i], sizeof keys[i], "passwd_user%06u", i);
        store(t, i);
    }
    for (u32 i = 0; i < 10 * KEYS; i++, at = (at * 69069u + 1u))
        store(t, (at >> 8) % KEYS);
    void (*counted[])(sc_table_t *, u32) = {counted_get, counted_miss, counted_set, counted_incr};
    for (u32 kind = 0; kind < 4; kind++)
        for (u32 i = 0; i < calls; i++, at = (at * 69069u + 1u))
            counted[kind](t, (at >> 8) % KEYS);
    sc_table_free(t);
    return 0;
}
