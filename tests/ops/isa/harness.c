/* Calls of kernels, read from stdin and answered on stdout: for processors that Python itself does not run on.
 *
 * FUNCTIONS is a list of FUNCTION(name). All numbers are int64_t. A call is
 *     the index of the function, bytes of the packed arguments, buffers B, relocations R,
 *     B sizes in bytes, R relocations, the packed arguments, the buffers.
 * Buffer 0 is the packed arguments. A relocation says that a pointer stands in a buffer, and where it points to, `to` -1
 * to the function whose index is `offset`. The answer is what the function returns, and the buffers 1 to B as it leaves
 * them, with what stood there for pointers. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef struct {
    int64_t in, at, to, offset;
} Relocation;

#define FUNCTION(name) int name(const void *);
FUNCTIONS
#undef FUNCTION
#define FUNCTION(name) name,
static int (*const functions[])(const void *) = {FUNCTIONS};

static void *checked(void *memory) {
    if (!memory || memory == MAP_FAILED) {
        perror("harness");
        exit(3);
    }
    return memory;
}

/* Whether there was anything to read. */
static int read_all(void *to, int64_t bytes) {
    int64_t got = (int64_t)fread(to, 1, (size_t)bytes, stdin);
    if (got != bytes && got) exit(4);
    return got == bytes;
}

static int64_t mapped_bytes(int64_t bytes) {
    int64_t page = sysconf(_SC_PAGESIZE);
    return (bytes + page - 1) / page * page + page;
}

/* Memory that ends, but for the alignment of tensors, where no byte can be read or written. */
static char *guarded(int64_t bytes) {
    int64_t page = sysconf(_SC_PAGESIZE), all = mapped_bytes(bytes);
    char *memory = checked(mmap(NULL, (size_t)all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (mprotect(memory + all - page, (size_t)page, PROT_NONE)) exit(5);
    return memory + (all - page - (bytes + 63) / 64 * 64);
}

static void free_guarded(char *memory, int64_t bytes) {
    int64_t page = sysconf(_SC_PAGESIZE);
    munmap((void *)((uintptr_t)memory / (uintptr_t)page * (uintptr_t)page), (size_t)mapped_bytes(bytes));
}

static char *target_of(Relocation place, char **memory) {
    return place.to < 0 ? (char *)functions[place.offset] : memory[place.to] + place.offset;
}

static void answer_call(const int64_t head[4]) {
    int64_t buffers = head[2] + 1, relocations = head[3];
    int64_t *sizes = checked(calloc((size_t)buffers, 8)), *stood = checked(calloc((size_t)relocations + 1, 8));
    Relocation *places = checked(calloc((size_t)relocations + 1, sizeof(Relocation)));
    char **memory = checked(calloc((size_t)buffers, sizeof(char *)));
    sizes[0] = head[1];
    read_all(sizes + 1, 8 * (buffers - 1));
    read_all(places, relocations * (int64_t)sizeof(Relocation));
    for (int64_t i = 0; i < buffers; i++) read_all(memory[i] = guarded(sizes[i]), sizes[i]);
    for (int64_t i = 0; i < relocations; i++) {
        char *target = target_of(places[i], memory), *place = memory[places[i].in] + places[i].at;
        memcpy(&stood[i], place, 8);
        memcpy(place, &target, 8);
    }
    int64_t returned = functions[head[0]](memory[0]);
    for (int64_t i = 0; i < relocations; i++) {
        char *target = target_of(places[i], memory), *place = memory[places[i].in] + places[i].at;
        if (!memcmp(place, &target, 8)) memcpy(place, &stood[i], 8); /* or it has been written since */
    }
    fwrite(&returned, 8, 1, stdout);
    for (int64_t i = 1; i < buffers; i++) fwrite(memory[i], 1, (size_t)sizes[i], stdout);
    fflush(stdout);
    for (int64_t i = 0; i < buffers; i++) free_guarded(memory[i], sizes[i]);
    free(sizes), free(stood), free(places), free(memory);
}

int main(void) {
    for (int64_t head[4]; read_all(head, sizeof head);) answer_call(head);
    return 0;
}
