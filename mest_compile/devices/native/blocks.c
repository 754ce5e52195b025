/* A plugin of qemu's user emulation: which blocks of code ran, and how often, between the guest's system calls 0x7ffe(1) and 0x7ffe(2).

   A block is what qemu translates at once: instructions up to a branch. It is written to the file of the argument out=PATH as one line:
   address, executions, number of instructions, each instruction's word in hexadecimal. Only one thread may run.
   The functions of qemu's plugin interface (version 1) are declared here, so that no header of qemu is needed. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MARK 0x7ffe
#define WORD 4           /* bytes of an instruction */
#define ADD_U64 0        /* qemu's only inline operation */
#define EXPORT __attribute__((visibility("default")))

struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef uint64_t plugin_id;
typedef void (*on_translation)(plugin_id, struct qemu_plugin_tb *);
typedef void (*on_syscall)(plugin_id, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t);
extern void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, on_translation);
extern void qemu_plugin_register_vcpu_syscall_cb(plugin_id, on_syscall);
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int, void *, uint64_t);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
extern struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
extern const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);

EXPORT int qemu_plugin_version = 1;

typedef struct Block {
  struct Block *next;
  uint64_t address, executions;
  size_t instructions;
  uint32_t words[];
} Block;

static Block *blocks;
static char path[4096];

static void translated(plugin_id id, struct qemu_plugin_tb *code) {
  size_t count = qemu_plugin_tb_n_insns(code);
  Block *block = calloc(1, sizeof *block + WORD * count);
  if (!block) abort();
  block->address = qemu_plugin_tb_vaddr(code);
  block->instructions = count;
  for (size_t i = 0; i < count; i++) memcpy(&block->words[i], qemu_plugin_insn_data(qemu_plugin_tb_get_insn(code, i)), WORD);
  block->next = blocks;
  blocks = block;
  qemu_plugin_register_vcpu_tb_exec_inline(code, ADD_U64, &block->executions, 1);
}

static void write_blocks(void) {
  FILE *out = fopen(path, "w");
  if (!out) return; /* the reader misses the file */
  for (Block *block = blocks; block; block = block->next) {
    if (!block->executions) continue;
    fprintf(out, "%llx %llu %zu", (unsigned long long)block->address, (unsigned long long)block->executions, block->instructions);
    for (size_t i = 0; i < block->instructions; i++) fprintf(out, " %08x", block->words[i]);
    fputc('\n', out);
  }
  fclose(out);
}

static void called(plugin_id id, unsigned cpu, int64_t number, uint64_t mark, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f,
                   uint64_t g, uint64_t h) {
  if (number != MARK) return;
  if (mark == 1)
    for (Block *block = blocks; block; block = block->next) block->executions = 0;
  else
    write_blocks();
}

EXPORT int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv) {
  if (argc != 1 || strncmp(argv[0], "out=", 4) || strlen(argv[0] + 4) >= sizeof path) return 1;
  strcpy(path, argv[0] + 4);
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_vcpu_syscall_cb(id, called);
  return 0;
}
