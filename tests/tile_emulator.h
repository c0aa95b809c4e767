/* AMX for CPUs without it: the very machine code that runs elsewhere, instruction by instruction.
 */
#ifndef TILE_EMULATOR_H
#define TILE_EMULATOR_H

/* From now on, an instruction on tiles that this CPU refuses is done in software; any other illegal
 * one, or one that a CPU with tiles would refuse too, ends the process as ever. */
void emulate_tiles(void);

#endif
