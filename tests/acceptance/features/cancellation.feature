Feature: Who stops asking frees the machine

  @S61
  Scenario: Ctrl+C
    When I interrupt a long answer of rbee-ctl
    Then the command ends with 130
    And what had come is on standard output
    And every slot of the fleet is free within 1 second

  @S62
  Scenario Outline: A client that just goes away
    When a client of the <part> closes its connection in the middle of a stream
    Then every slot of the fleet is free within 1 second
    And the engine that served it is at rest

    Examples:
      | part   |
      | queen  |
      | worker |

  @S63
  Scenario Outline: DELETE, twice, and for a request that never was
    When I delete a running request of the <part> twice and an unknown one once
    Then each answer is 204
    And the stream ended as cancelled
    And every slot of the fleet is free within 1 second

    Examples:
      | part   |
      | queen  |
      | worker |
