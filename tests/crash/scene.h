/* scene.h - a prepared small segment, the operations harnesses perform on it, and what may be seen afterwards. */
#ifndef SCENE_H
#define SCENE_H
#include "rig.h"

#define SCENE_ITEMS 512
#define SCENE_NOW 100000u

enum scene_op {
    OP_INSERT, OP_OVERWRITE, OP_DELETE, OP_INCR, OP_TOUCH, OP_CAS, OP_APPEND, OP_CLEAN, OP_CLEAR, OP_ADD, OP_RETYPE,
    OP_LEASE, OP_TICK, N_OPS
};
enum scene_fill { FILL_EMPTY, FILL_HALF, FILL_FULL, N_FILLS };

typedef struct {
    int present, is_num, expired;
    u64 version, deadline;
    u32 vlen;
    i64 num;
} scene_item_t;

typedef struct {
    enum scene_op op;
    enum scene_fill fill;
    u32 vlen;
    u32 guard_kind, flags, buckets;
    u64 seed;
} scene_want_t;

typedef struct {
    scene_want_t want;
    rig_t *rig;
    sc_table_t *t; /* the writer */
    scene_item_t item[SCENE_ITEMS], before, after;
    u32 n_items, target;
    int may_evict;
    int distinct;  /* a reader can tell the new state from the old one */
    u8 *image;     /* the segment before the operation */
    u8 *value, *work;
    sc_token_t token;
    u64 entry, life, lease_owner;
    int rc;
} scene_t;

const char *scene_op_name(enum scene_op op);
const char *scene_fill_name(enum scene_fill fill);
scene_t *scene_new(const scene_want_t *want);
void scene_free(scene_t *c);
/* The segment as before the operation. */
void scene_reset(scene_t *c);
/* Performs the operation on the writer's handle; the answer is in c->rc. */
void scene_perform(scene_t *c);

/* What a reader of t sees against what is allowed while the operation may or may not have happened.
 * saw_new: 1 = the target had its new state.  0 = nothing wrong, else a text. */
enum { SCENE_OTHERS_MAY_GO = 1, SCENE_TARGET_MAY_GO = 2 };
const char *scene_verify(scene_t *c, sc_table_t *t, int allow, int *saw_new, char *msg, size_t len);
/* More operations on t, then everything verified again; NULL or a text. */
const char *scene_go_on(scene_t *c, sc_table_t *t, char *msg, size_t len);
#endif
