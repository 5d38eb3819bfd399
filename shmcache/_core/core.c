/* core.c - the extension as one translation unit.
 *
 * A get is a dozen small functions from as many files; compiled together they inline into one another with any compiler,
 * without link-time optimisation.  Tests build the files apart. */
#include "heap.c"
#include "index.c"
#include "evict.c"
#include "guard.c"
#include "ipc.c"
#include "table.c"
#include "sweep.c"
#include "lease.c"
#include "format.c"
#include "check.c"
#include "resize.c"
#include "repair.c"

#include "pyvalue.c"

#include "pyread.c"

#include "pytable.c"

#include "pywalk.c"

#include "pyadmin.c"

#include "pymap.c"

#include "pyresize.c"

#include "module.c"
