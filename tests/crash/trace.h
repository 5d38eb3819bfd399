/* trace.h - single-stepping code of this very process by the processor's trap flag (x86-64).
 *
 * Between trace_on and trace_off every instruction ends in SIGTRAP, whose handler calls trace_hook.  The hook runs with the
 * flag off; it may switch it on again for code it wants stepped itself (a crash during a recovery).  This visits the same
 * instruction boundaries as ptrace, without a second process. */
#ifndef TRACE_H
#define TRACE_H
#if !defined(__x86_64__)
#error "the trap flag is used in its x86-64 form"
#endif
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

static void (*trace_hook)(uint64_t rip, ucontext_t *ctx);

#define trace_on() \
    __asm__ volatile("lea -128(%%rsp),%%rsp; pushfq; orq $0x100,(%%rsp); popfq; lea 128(%%rsp),%%rsp" ::: "memory", "cc")
#define trace_off() \
    __asm__ volatile("lea -128(%%rsp),%%rsp; pushfq; andq $~0x100,(%%rsp); popfq; lea 128(%%rsp),%%rsp" ::: "memory", "cc")

static inline void trace_stop(ucontext_t *ctx) { ctx->uc_mcontext.gregs[REG_EFL] &= ~0x100ll; }
static inline void trace_go(ucontext_t *ctx) { ctx->uc_mcontext.gregs[REG_EFL] |= 0x100ll; }

static void trace_trap(int sig, siginfo_t *info, void *ctx)
{
    ucontext_t *u = (ucontext_t *)ctx;
    (void)sig;
    (void)info;
    trace_hook((uint64_t)u->uc_mcontext.gregs[REG_RIP], u);
}
static inline void trace_init(void)
{
    struct sigaction sa;
    memset(&sa, 0, sizeof sa);
    sa.sa_sigaction = trace_trap;
    sa.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGTRAP, &sa, NULL);
}
#endif
