/* image.h - one segment being rotted and used: changing places, operations on it, and whether a value read was ever set.
 *
 * Every choice is drawn from w.rng or, where w.tape is set, from its bytes: that makes a fuzzer's input of them. */
#ifndef IMAGE_H
#define IMAGE_H
#include "scene.h"

typedef struct {
    scene_t *c;
    sc_table_t *t;
    rig_rng_t rng;
    const u8 *tape, *tape_end; /* NULL: choices are random */
    volatile u64 image;
    u64 seed, reads, hits, superseded, numbers, busy, bad;
    u8 *buf, *keybuf;
    volatile int where;
    char label[64];
} image_world_t;
extern image_world_t w;

void image_init(void);
u64 draw(void);
u32 below(u32 n);
int tape_over(void);
/* Prints what was found, where it was found and how to replay it. */
void say(const char *what);
/* Changes one place; the header page is left out, every handle has its own checked copy of it. */
void mutate(const sc_table_t *t, u8 *base);
void read_one(sc_table_t *t, u64 id);
void write_one(sc_table_t *t, u64 id);
void walk(sc_table_t *t);
#endif
