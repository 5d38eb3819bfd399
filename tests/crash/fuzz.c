/* fuzz.c - libFuzzer target: a sound segment image, then whatever the input says is changed in it and done with it.
 *
 * The input's first byte chooses one of N_SCENES sound segments (guard, fill, forms of items and index); what follows is the
 * tape that image.c draws its choices from: places to rot, values to write there, operations, keys, lengths.  Sanitizers find
 * what crashes, libFuzzer's time limit what hangs, the judge of image.c what was never set for its key; each ends the process. */
#include "image.h"
#include <stdint.h>
#include <stdlib.h>

#define N_SCENES 8u
#define MOST 48u /* changes and operations of one input */

static scene_t *scenes[N_SCENES];
static sc_table_t *tables[N_SCENES];

static void choose(u32 n)
{
    static const u32 flags[] = {0, 0, SC_F_NO_EVICT, SC_F_SECURE, 0, SC_F_HEADER_ONLY, 0, SC_F_SECURE};
    if (scenes[n] == NULL) {
        scene_want_t want = {n % 3 ? OP_OVERWRITE : OP_INCR, n % 2 ? FILL_FULL : FILL_HALF, 700, n % 4 ? SC_GUARD_FAST : SC_GUARD_SEMAPHORE,
                             flags[n], n < 6 ? 64 : 16, 1000003u + n};
        const u8 *tape = w.tape;
        w.tape = NULL;
        scenes[n] = scene_new(&want);
        tables[n] = rig_handle(scenes[n]->rig, 1);
        tables[n]->clock.frozen_ms = SCENE_NOW;
        w.tape = tape;
    }
    w.c = scenes[n];
    w.t = tables[n];
}

int LLVMFuzzerTestOneInput(const u8 *data, size_t size);
int LLVMFuzzerTestOneInput(const u8 *data, size_t size)
{
    if (size < 2)
        return 0;
    if (w.buf == NULL)
        image_init();
    choose(data[0] % N_SCENES);
    w.tape = data + 1;
    w.tape_end = data + size;
    memcpy(w.c->rig->base, w.c->image, w.c->rig->size);
    rig_mark_worker(w.t);
    rig_guard_value(w.c->rig, 1);
    w.t->lost = 0;
    w.t->next_clean = 0;
    for (u32 n = 0; n < MOST && !tape_over(); n++) {
        switch (below(8)) {
        case 0: case 1: case 2: mutate(w.t, w.c->rig->base); break;
        case 3: case 4: write_one(w.t, below(2) ? below(w.c->n_items) : 600 + below(20)); break;
        case 5: case 6: read_one(w.t, below(4) ? below(w.c->n_items) : below(620)); break;
        default:
            w.where = 2;
            walk(w.t);
        }
    }
    w.where = 3;
    for (u32 id = 0; id < 8; id++)
        read_one(w.t, id);
    (void)rig_audit(w.t, 1);
    w.image++;
    if (w.bad > 0)
        abort();
    return 0;
}
