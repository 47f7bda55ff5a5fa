# The life of a training job, attempt by attempt; sourced by the job script.
#
#     begin_attempt RUN_DIR   say where, and which attempt; end the job if it gets nowhere
#     launch COMMAND...       srun and the ranks; over when srun is, or when no rank has given a sign of life for long
#     end_attempt             finished: status 0; refused: status 2; else requeued, to go on from the newest checkpoint
#
# What decides is what rank 0 left in $state/outcome (0: finished, 85: stopped by a signal, position saved, 2: refused)
# and which checkpoints there are. srun's own status is that of the rank that was first, or lost, and decides nothing.

max_stalled=${max_stalled:-3} # attempts in a row that end without a newer checkpoint
requeue=${requeue:-yes}
export ICCLD_SILENCE_S=${ICCLD_SILENCE_S:-60} # without a sign of life from any rank

say() { echo "iccld: $*"; }

begin_attempt() {
    run_dir=$1 state=$1/slurm/job_$SLURM_JOB_ID restart=${SLURM_RESTART_COUNT:-0}
    mkdir -p "$state/alive" || exit 1
    trap 'say "the job was asked to end; the ranks save"' TERM # and go on waiting for them
    export ICCLD_OUTCOME=$state/outcome ICCLD_ALIVE=$state/alive
    log=$(readlink -f "/proc/$$/fd/1")
    say "job $SLURM_JOB_ID, restart $restart, on $SLURM_JOB_NODELIST, $(date '+%F %T')"
    if [ -e "$state/running_on" ]; then # the attempt before this one was cut off
        say "the attempt on $(cat "$state/running_on") was cut off"
        blame_node_failure || blame_nodes_that_are_down "$(cat "$state/running_on")"
    fi
    stat -c %s "$log" >"$state/log_begin" 2>/dev/null
    [ "$(cat "$state/outcome" 2>/dev/null)" != 0 ] || { say "finished before; nothing to do"; exit 0; }
    rm -f "$state/outcome"
    count_stalled
    say "going on from: ${progress_before:-the beginning}"
    echo "$SLURM_JOB_NODELIST" >"$state/running_on"
}

# What the job has achieved: newest checkpoint and model of each stage, scores.
progress() {
    (
        cd "$run_dir" || exit
        for stage in stage*/; do
            [ ! -e "$stage/checkpoints/latest" ] || echo -n "$stage$(cat "$stage/checkpoints/latest") "
            [ ! -e "$stage/final" ] || echo -n "${stage}final "
        done
        for report in report/*; do [ ! -e "$report" ] || echo -n "$report "; done
    )
}

count_stalled() {
    stalled=0
    progress_before=$(progress)
    if [ -e "$state/progress" ] && [ "$progress_before" = "$(cat "$state/progress")" ]; then
        stalled=$(($(cat "$state/stalled") + 1))
    fi
    echo "$stalled" >"$state/stalled"
    echo "$progress_before" >"$state/progress"
    [ "$stalled" -lt "$max_stalled" ] || give_up
}

give_up() {
    say "$max_stalled attempts without a newer checkpoint; not started again. Mend what the log names, and submit again."
    rm -f "$state/running_on"
    exit 1
}

launch() {
    local signs last silent=0 poll_s=$((ICCLD_SILENCE_S < 50 ? 1 : 5)) waiting
    events_begin=$(stat -c %s "$run_dir/events.jsonl" 2>/dev/null || echo 0)
    last=$(signs_of_life)
    "$@" &
    launched=$!
    while kill -0 "$launched" 2>/dev/null; do
        sleep "$poll_s" &
        waiting=$!
        wait -n "$launched" "$waiting"
        status=$?
        kill "$waiting" 2>/dev/null
        signs=$(signs_of_life)
        silent=$((silent + poll_s))
        if [ "$signs" != "$last" ]; then last=$signs silent=0; fi
        if [ "$silent" -gt "$ICCLD_SILENCE_S" ]; then # a step daemon that was killed: srun would wait for ever
            say "no rank has given a sign of life for $ICCLD_SILENCE_S s; srun is left behind"
            kill -KILL "$launched"
            wait "$launched" 2>/dev/null
            status=137
            break
        fi
    done
}

signs_of_life() { cat "$state"/alive/* 2>/dev/null | cksum; }

end_attempt() {
    rm -f "$state/running_on"
    case $(cat "$state/outcome" 2>/dev/null) in
    0)
        say "finished"
        exit 0
        ;;
    2) # what is wrong on the first attempt will be wrong on the next
        [ "$restart" != 0 ] || { say "refused; not started again"; exit 2; }
        say "refused"
        ;;
    85)
        say "stopped by a signal; saved: $(progress)"
        blame_node_failure
        ;;
    *)
        say "ended with status $status; there is: $(progress)"
        blame_node_failure || blame_first_to_end
        ;;
    esac
    [ "$(progress)" != "$progress_before" ] || [ $((stalled + 1)) -lt "$max_stalled" ] || give_up
    requeue
}

requeue() {
    local now
    [ "$requeue" = yes ] || { say "not requeued, as was asked for; submit again, and it goes on"; exit 1; }
    now=$(scontrol show job "$SLURM_JOB_ID" --oneliner | grep -o 'JobState=[A-Z_]*' | head -n 1)
    case $now in
    JobState=RUNNING)
        say "requeued"
        trap "" TERM
        scontrol requeue "$SLURM_JOB_ID" && sleep 60 && exit 1 # ended by the requeue
        say "could not be requeued; submit again, and it goes on"
        ;;
    *) say "not requeued: ${now#JobState=}" ;; # cancelled, or requeued already
    esac
    exit 1
}

# NODE WHY: a line that the next submit counts.
blame() {
    printf '%s\t%s\tjob %s, restart %s\t%s\n' "$1" "$(date '+%F %T')" "$SLURM_JOB_ID" "$restart" "$2" \
        >>"$run_dir/slurm/failed_nodes"
    say "node $1 failed: $2"
}

# What the attempt that ended last has added to the log.
own_log() { tail -c "+$(($(cat "$state/log_begin" 2>/dev/null) + 1))" "$log" 2>/dev/null; }

blame_node_failure() {
    [[ $(own_log) =~ srun:\ error:\ Node\ failure\ on\ ([A-Za-z0-9._-]+) ]] && blame "${BASH_REMATCH[1]}" "down while the job ran on it"
}

# A watchdog or the check before the start has named a rank's node; else srun names that of a task which a signal ended.
# Only the first: it ends the others. What ended by itself, with a traceback, says nothing of the node.
blame_first_to_end() {
    local named first
    named=$(tail -c "+$((events_begin + 1))" "$run_dir/events.jsonl" 2>/dev/null | grep -m 1 -E '"event": "(stopped|unfit)"')
    if [[ $named =~ \"host\":\ \"([A-Za-z0-9._-]+)\" ]]; then
        blame "${BASH_REMATCH[1]}" "$named"
        return
    fi
    first=$(own_log | grep -m 1 -E '^srun: error: [^:]+: tasks? [0-9,-]+: ')
    if [[ $first =~ ^srun:\ error:\ ([A-Za-z0-9._-]+:\ task\ [0-9]+:\ .*) && $first != *": Exited"* ]]; then
        blame "${BASH_REMATCH[1]%%:*}" "${BASH_REMATCH[1]}"
    fi
}

blame_nodes_that_are_down() {
    local node
    for node in $(sinfo -h -N -n "$1" -t down,drain,fail,no_respond -o %N 2>/dev/null | sort -u); do
        blame "$node" "down while the job ran on it"
    done
}
