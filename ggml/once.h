/* C11 has call_once, but not every C library has it; threads.cpp does. */
#ifndef GGML_ONCE_H
#define GGML_ONCE_H

#ifdef __cplusplus
extern "C" {
#endif

/* Runs init, whoever comes first; others wait until it is done. There is one init in this library.
 */
void ggml_once(void (*init)(void));

#ifdef __cplusplus
}
#endif

#endif
