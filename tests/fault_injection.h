/* Makes calls of the C and C++ libraries fail on demand, in this process and in what it links. */
#ifndef FAULT_INJECTION_H
#define FAULT_INJECTION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum fault {
    FAULT_NONE,
    FAULT_NEW,
    FAULT_READ,
    FAULT_WRITE,
    FAULT_FSYNC,
    FAULT_CLOSE,
    FAULT_RENAME
};

/* From now on the nth call (1, 2, …) of that kind fails, and only that one. */
void fault_arm(enum fault kind, long nth);

/* No more failures. Returns whether the call that was to fail was made. */
bool fault_disarm(void);

/* Progress that throws what is no std::exception. */
bool fault_throw(void * user, uint64_t done, uint64_t total);

/* Bytes that operator new with an alignment has given out so far, a KiB or more at a time. */
size_t fault_aligned_bytes(void);

#ifdef __cplusplus
}
#endif

#endif
