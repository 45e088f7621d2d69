/* A plugin for qemu-user that counts the instructions of a process: `-plugin FILE,out=PATH,mark=NUMBER`.
 *
 * At every system call of that number it notes how many instructions were executed so far; PATH gets one line for each.
 * The process marks with it where what is to be counted begins and ends.
 *
 * The part of QEMU's plugin interface that it uses is declared here, because distributions ship it without its header.
 * Source: https://www.qemu.org/docs/master/devel/tcg-plugins.html
 */

#include <inttypes.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
typedef struct qemu_info_t qemu_info_t;
typedef void (*on_translated)(qemu_plugin_id_t id, struct qemu_plugin_tb *tb);
typedef void (*on_executed)(unsigned int cpu, void *data);
typedef void (*on_syscall)(qemu_plugin_id_t id, unsigned int cpu, int64_t number, uint64_t a1, uint64_t a2, uint64_t a3,
                           uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8);
enum { NO_REGISTERS = 0 };

extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
extern void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, on_translated call);
extern void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *tb, on_executed call, int flags, void *data);
extern void qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t id, on_syscall call);

__attribute__((visibility("default"))) int qemu_plugin_version = PLUGIN_VERSION;

static uint64_t total;
static int64_t mark = -1;
static char path[4096];

static void executed(unsigned int cpu, void *data) {
    (void)cpu;
    __atomic_fetch_add(&total, (uint64_t)(uintptr_t)data, __ATOMIC_RELAXED);
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb) {
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_cb(tb, executed, NO_REGISTERS, (void *)(uintptr_t)qemu_plugin_tb_n_insns(tb));
}

static void called(qemu_plugin_id_t id, unsigned int cpu, int64_t number, uint64_t a1, uint64_t a2, uint64_t a3,
                   uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8) {
    (void)id, (void)cpu, (void)a1, (void)a2, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    if (number == mark) {
        FILE *out = fopen(path, "a");
        if (out != NULL) {
            fprintf(out, "%" PRIu64 "\n", __atomic_load_n(&total, __ATOMIC_RELAXED));
            fclose(out);
        }
    }
}

__attribute__((visibility("default"))) int qemu_plugin_install(
    qemu_plugin_id_t id, const qemu_info_t *info, int count, char **arguments) {
    (void)info;
    for (int i = 0; i < count; i++) {
        if (strncmp(arguments[i], "out=", 4) == 0) {
            snprintf(path, sizeof path, "%s", arguments[i] + 4);
        } else if (strncmp(arguments[i], "mark=", 5) == 0) {
            mark = strtoll(arguments[i] + 5, NULL, 10);
        }
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_vcpu_syscall_cb(id, called);
    return 0;
}
