Feature: From one command to a story
  A person names a machine and a model. Everything that is missing is brought up, in order and visibly; what is there is used.

  @S11 @S87 @N05
  Scenario: A model that no machine has yet is fetched, loaded and asked
    Given a hub that has the model "lab/story" and sends 15 MB a second
    When I ask "lab2" with "hf:lab/story:SmolLM2-135M-Instruct.Q4_1.gguf" to go on from "Once upon a time"
    Then the command ends with 0
    And standard output is the story and nothing else
    And a playbook ran
    And standard error tells of these steps in order:
      | no worker serves   |
      | downloading        |
      | RAM                |
      | layers or slots of |
      | is idle            |
      | done               |
    And the hub has sent the whole file once
    And the download was reported at least twice before it was complete
    And the story has at most 20 tokens
    And "lab2" has the model "hf:lab/story" in its catalog, ready
    And the worker that told it is idle again

  @S12 @S87
  Scenario: A worker that is there is simply asked
    Given a hub that has the model "lab/story" and sends 15 MB a second
    And the process ids of all workers
    When I ask "lab1" with "smollm2-135m-instruct" to go on from "The bees"
    Then the command ends with 0
    And standard output is the story and nothing else
    And no playbook ran
    And the hub was not asked for anything
    And the process ids of all workers are unchanged
